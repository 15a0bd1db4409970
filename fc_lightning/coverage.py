"""What a domain's calls could say, and how often given calls do say it.

Counted by function, argument and value, so that what is never trained or measured is seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fc_lightning.calls import INCOMPLETE_PREFIX, FunctionCall
from fc_lightning.functions import ParameterSpec, Registry, Scalar

NOT_SAID = "(not said)"
ANY_TEXT = "(any text)"
ANY_NUMBER = "(any number)"
_MAX_INTEGERS = 1_000  # of one argument, so that each is counted by itself


def coverage(registry: Registry, calls: Iterable[FunctionCall]) -> dict[tuple[str, str, str], int]:
    """How often each (function, argument, value) occurs; what could occur but doesn't counts 0.

    Up to 1,000 integers within bounds are values of their own, others ANY_NUMBER; free text is
    ANY_TEXT. An array counts its elements, and of an enum their number as "2 of 4". Optional
    arguments also count NOT_SAID; an incomplete call counts under its own name, with '' for what is
    missing.
    """
    counts = Counter({row: 0 for row in _possible_rows(registry)})
    for call in calls:
        spec = registry.spec(call.name)
        for parameter in spec.parameters if spec else ():
            value = call.arguments.get(parameter.name)
            for label in _labels(parameter, value):
                counts[call.name, parameter.name, label] += 1
        if spec and not spec.parameters:
            counts[call.name, "", ""] += 1
    return dict(counts)


def never_said(
    registry: Registry, calls: Iterable[FunctionCall]
) -> dict[tuple[str, str], list[str]]:
    """What `coverage` counts 0: values by call name and argument, in schema order."""
    unsaid: dict[tuple[str, str], list[str]] = {}
    for (name, argument, value), count in coverage(registry, calls).items():
        if not count:
            unsaid.setdefault((name, argument), []).append(value)
    return unsaid


def _possible_rows(registry: Registry) -> list[tuple[str, str, str]]:
    rows = []
    for name in registry.call_names:
        spec = registry.spec(name)
        assert spec is not None, name
        is_incomplete = name.startswith(INCOMPLETE_PREFIX)
        for parameter in spec.parameters:
            if is_incomplete and parameter.is_required:
                rows.append((name, parameter.name, "''"))
                if len(spec.required) == 1:
                    continue
            rows += [(name, parameter.name, label) for label in _possible_labels(parameter)]
        if not spec.parameters:
            rows.append((name, "", ""))
    return rows


def _possible_labels(parameter: ParameterSpec) -> list[str]:
    labels = [_label(parameter, value) for value in _few_values(parameter)]
    labels = labels or [_label(parameter, None)]
    if parameter.type == "array" and parameter.enum:
        labels += [f"{n} of {len(parameter.enum)}" for n in range(1, len(parameter.enum) + 1)]
    return labels if parameter.is_required else [*labels, NOT_SAID]


def _labels(parameter: ParameterSpec, value: Any) -> list[str]:
    if value is None:
        return [NOT_SAID]
    if not isinstance(value, list):
        return [_label(parameter, value)]
    sizes = [f"{len(value)} of {len(parameter.enum)}"] if parameter.enum else []
    return [*(_label(parameter, item) for item in value), *sizes]


def _label(parameter: ParameterSpec, value: Any) -> str:
    """What a scalar, or one element of an array, is counted as."""
    if value == "":
        return "''"
    if _few_values(parameter):
        return str(parameter.canonical(value))
    return ANY_TEXT if "string" in (parameter.type, parameter.item_type) else ANY_NUMBER


def _few_values(parameter: ParameterSpec) -> Sequence[Scalar]:
    """The values of a scalar, or of an element, that are counted one by one; empty if too many."""
    kind, low, high = parameter.item_type or parameter.type, parameter.minimum, parameter.maximum
    if parameter.enum or kind == "boolean":
        return parameter.enum or (False, True)
    if kind == "string" or low is None or high is None or not high - low < _MAX_INTEGERS:
        return ()
    return range(math.ceil(low), math.floor(high) + 1)
