"""How well calls are predicted: matches, argument triples, kinds of error, confused functions.

`compare_calls` judges one prediction; `CallMetrics` sums such judgements, over processes too, and
everything it reports is a ratio of integers. Nothing ever leaves a denominator: an unreadable
prediction is a miss. Reading text and running models happen elsewhere.

Shapes: N call names of the registry (functions, then their incomplete forms).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from fc_lightning.calls import (
    INCOMPLETE_PREFIX,
    FunctionCall,
    UnreadableCall,
    calls_equal,
    parse_call,
    scalars_equal,
    value_key,
)
from fc_lightning.functions import ParameterSpec, Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By example, the first that fits.
EXAMPLE_ERRORS = ("InvalidOutput", "HallucinatedFunction", "InvalidFunction")
# If the function is right: by argument, the first that fits, then by element of an array.
ARGUMENT_ERRORS = (
    "MissingParameter",
    "HallucinatedParameter",
    "IncorrectParameterTypeArray",
    "HallucinatedParameterValue",
    "IncorrectParameterValue",
    "HallucinatedArrayElement",
    "IncorrectArrayElement",
    "MissingArrayElement",
)
ERROR_KINDS = (*EXAMPLE_ERRORS, *ARGUMENT_ERRORS)


# ---------------------------------------------------------------- one prediction


class CallError(NamedTuple):
    """One thing that is wrong with a prediction; without `argument`, the two are call names."""

    kind: str
    argument: str | None
    expected: Any
    predicted: Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prediction judged.

    Triples are (name, argument, value), each array element its own; under a wrong function none is
    shared. `errors` is empty exactly if `is_match`.
    """

    is_match: bool
    is_function_match: bool
    is_valid: bool
    num_shared_triples: int
    num_predicted_triples: int
    num_expected_triples: int
    errors: tuple[CallError, ...]


def read_call(text: str) -> FunctionCall | None:
    """The call in a model's text; None if it is unreadable, which counts as a miss."""
    try:
        return parse_call(text)
    except UnreadableCall:
        return None


def compare_calls(
    registry: Registry, expected: FunctionCall, predicted: FunctionCall | None
) -> Comparison:
    """Judge a prediction; None stands for unreadable text.

    >>> from fc_lightning.functions import load_registry
    >>> expected = FunctionCall("set_fan_speed", {"speed": "low", "area": ["driver"]})
    >>> predicted = FunctionCall("set_fan_speed", {"speed": "low"})
    >>> compare_calls(load_registry(), expected, predicted).errors
    (CallError(kind='MissingParameter', argument='area', expected=['driver'], predicted=None),)
    """
    num_expected = _num_triples(expected)
    if predicted is None:
        error = CallError("InvalidOutput", None, expected.name, None)
        return Comparison(False, False, False, 0, 0, num_expected, (error,))
    num_predicted = _num_triples(predicted)
    is_valid = not registry.violations(predicted)
    if predicted.name != expected.name:
        is_known = predicted.name in registry.call_names
        kind = "InvalidFunction" if is_known else "HallucinatedFunction"
        error = CallError(kind, None, expected.name, predicted.name)
        return Comparison(False, False, is_valid, 0, num_predicted, num_expected, (error,))
    return Comparison(
        calls_equal(expected, predicted),
        True,
        is_valid,
        _num_shared_triples(expected, predicted),
        num_predicted,
        num_expected,
        tuple(_argument_errors(registry, expected, predicted)),
    )


def _elements(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _num_triples(call: FunctionCall) -> int:
    return sum(len(_elements(value)) for value in call.arguments.values())


def _num_shared_triples(expected: FunctionCall, predicted: FunctionCall) -> int:
    num_shared = 0
    for argument in expected.arguments.keys() & predicted.arguments.keys():
        values = _elements(predicted.arguments[argument])
        unmatched = _without_match(values, _elements(expected.arguments[argument]))
        num_shared += len(values) - len(unmatched)
    return num_shared


def _without_match(elements: list[Any], others: list[Any]) -> list[Any]:
    """The elements that equal none of `others`, and repeats: each of `others` matches once."""
    free = set(map(value_key, others))
    unmatched = []
    for element in elements:
        if (key := value_key(element)) in free:
            free.remove(key)
        else:
            unmatched.append(element)
    return unmatched


def _argument_errors(
    registry: Registry, expected: FunctionCall, predicted: FunctionCall
) -> Iterable[CallError]:
    spec = registry.spec(expected.name)
    parameters = spec.by_name if spec else {}
    for argument, value in expected.arguments.items():
        if argument not in predicted.arguments:
            yield CallError("MissingParameter", argument, value, None)
            continue
        parameter, said = parameters.get(argument), predicted.arguments[argument]
        if isinstance(value, list) and isinstance(said, list):
            yield from _element_errors(argument, parameter, value, said)
        elif isinstance(value, list) or isinstance(said, list):
            yield CallError("IncorrectParameterTypeArray", argument, value, said)
        elif not scalars_equal(value, said):
            # In an incomplete request '' says that a required argument was left out.
            is_left_out = argument in predicted.missing and parameter and parameter.is_required
            is_allowed = is_left_out or _is_allowed(parameter, said)
            kind = "IncorrectParameterValue" if is_allowed else "HallucinatedParameterValue"
            yield CallError(kind, argument, value, said)
    for argument, said in predicted.arguments.items():
        if argument not in expected.arguments:
            yield CallError("HallucinatedParameter", argument, None, said)


def _element_errors(
    argument: str, parameter: ParameterSpec | None, expected: list[Any], predicted: list[Any]
) -> Iterable[CallError]:
    for element in _without_match(predicted, expected):
        is_allowed = _is_allowed(parameter, element)
        kind = "IncorrectArrayElement" if is_allowed else "HallucinatedArrayElement"
        yield CallError(kind, argument, expected, element)
    for element in _without_match(expected, predicted):
        yield CallError("MissingArrayElement", argument, element, predicted)


def _is_allowed(parameter: ParameterSpec | None, item: Any) -> bool:
    """Whether a scalar or array element is inside the schema's enum, bounds and type."""
    return parameter is None or parameter.item_violation(item) is None


# ---------------------------------------------------------------- many predictions

_COUNTS = (
    "examples",
    "matches",
    "function_matches",
    "valid",
    "predicted_incomplete",
    "shared_triples",
    "predicted_triples",
    "expected_triples",
    *ERROR_KINDS,
)


class CallMetrics(Metric):
    """All measures over (expected, predicted) calls, exact whatever the number of processes.

    The state is two integer tensors, so their sum over processes is that of a single process:
    `counts` (N, counts) by expected call name, and `confusion` (N, N + 2), from expected to
    predicted call name, with a column for unknown names and one for unreadable predictions.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    confusion: Tensor

    def __init__(self, registry: Registry, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.registry = registry
        self.call_names = registry.call_names
        self._rows = {name: i for i, name in enumerate(self.call_names)}
        num_names = len(self.call_names)
        counts = torch.zeros(num_names, len(_COUNTS), dtype=torch.long)
        confusion = torch.zeros(num_names, num_names + 2, dtype=torch.long)
        self.add_state("counts", counts, dist_reduce_fx="sum")
        self.add_state("confusion", confusion, dist_reduce_fx="sum")

    def update(
        self, expected: Sequence[FunctionCall], predicted: Sequence[FunctionCall | None]
    ) -> None:
        """Count a batch; None stands for an unreadable prediction.

        An unreadable expectation is an error of the data, to be found before anything is predicted
        (`doctor` lists them with file and row), so here there is no None to expect.

        Raises:
            ValueError: lengths differ, or an expected call's function is not in the registry;
                nothing was counted.
        """
        counts, cells = [], []
        for call, prediction in zip(expected, predicted, strict=True):
            row = self._row(call)
            counts.append(_count(compare_calls(self.registry, call, prediction), prediction))
            cells.append((row, self._column(prediction)))
        if not counts:
            return
        rows, columns = torch.tensor(cells, device=self.counts.device).unbind(1)
        self.counts.index_add_(0, rows, torch.tensor(counts, device=self.counts.device))
        self.confusion.index_put_((rows, columns), torch.ones_like(rows), accumulate=True)

    def _row(self, expected: FunctionCall) -> int:
        if expected.name not in self._rows:
            raise ValueError(
                f"the expected call's function {expected.name!r} is not in the registry;"
                " evaluate with the registry that belongs to these examples"
            )
        return self._rows[expected.name]

    def _column(self, predicted: FunctionCall | None) -> int:
        unknown = len(self.call_names)
        return unknown + 1 if predicted is None else self._rows.get(predicted.name, unknown)

    def compute(self) -> dict[str, Tensor]:
        """Scalars under flat names, good for logging; a ratio over nothing is nan.

        The `measures` of all examples; `complete_` and `incomplete_call_match`; precision, recall
        and F1 of the incomplete decision; `call_match/<function>`, both its forms together.
        """
        incomplete = [n for n in self.call_names if n.startswith(INCOMPLETE_PREFIX)]
        complete = [n for n in self.call_names if n not in incomplete]
        measures = self.measures(self.call_names)
        measures["complete_call_match"] = self.measures(complete)["call_match"]
        measures["incomplete_call_match"] = self.measures(incomplete)["call_match"]
        everywhere, there = self._totals(self.call_names), self._totals(incomplete)
        measures |= _precision_recall_f1(
            "incomplete",
            there["predicted_incomplete"],
            everywhere["predicted_incomplete"],
            there["examples"],
        )
        for function in self.registry.by_name:
            forms = (function, INCOMPLETE_PREFIX + function)
            measures[f"call_match/{function}"] = self.measures(forms)["call_match"]
        return measures

    def measures(self, call_names: Iterable[str]) -> dict[str, Tensor]:
        """The measures over this process's examples that expect one of `call_names`.

        `num_examples`, `call_match`, `function_match`, `argument_match` (over those with the right
        function), `argument_precision`, `_recall` and `_f1` over triples, `valid`, and a count
        `errors/<kind>` for every kind.
        """
        count = self._totals(call_names)
        return {
            "num_examples": count["examples"],
            "call_match": count["matches"] / count["examples"],
            "function_match": count["function_matches"] / count["examples"],
            "argument_match": count["matches"] / count["function_matches"],
            "valid": count["valid"] / count["examples"],
            **_precision_recall_f1(
                "argument",
                count["shared_triples"],
                count["predicted_triples"],
                count["expected_triples"],
            ),
            **{f"errors/{kind}": count[kind] for kind in ERROR_KINDS},
        }

    def _totals(self, call_names: Iterable[str]) -> dict[str, Tensor]:
        rows = [self._rows[n] for n in call_names if n in self._rows]
        return dict(zip(_COUNTS, self.counts[rows].sum(0).float(), strict=True))

    def confusion_matrix(self) -> Tensor:
        """Examples by expected and predicted call name, (N, N + 2), summed over processes.

        The last two columns are unknown names and unreadable predictions. Under DDP every process
        must call this.
        """
        with self.sync_context():
            return self.confusion.clone()


def _count(comparison: Comparison, prediction: FunctionCall | None) -> list[int]:
    """One example's contribution to each of `_COUNTS`."""
    kinds = [error.kind for error in comparison.errors]
    return [
        1,
        comparison.is_match,
        comparison.is_function_match,
        comparison.is_valid,
        prediction is not None and not prediction.is_complete,
        comparison.num_shared_triples,
        comparison.num_predicted_triples,
        comparison.num_expected_triples,
        *(kinds.count(kind) for kind in ERROR_KINDS),
    ]


def _precision_recall_f1(
    prefix: str, num_shared: Tensor, num_predicted: Tensor, num_expected: Tensor
) -> dict[str, Tensor]:
    return {
        f"{prefix}_precision": num_shared / num_predicted,
        f"{prefix}_recall": num_shared / num_expected,
        f"{prefix}_f1": 2 * num_shared / (num_predicted + num_expected),
    }


def wilson_interval(
    num_successes: int, num_trials: int, *, z: float = 1.959964
) -> tuple[float, float]:
    """The interval that holds a proportion, by default at 95 %; everything if nothing was tried.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference",
    JASA 22 (1927). Unlike p +- z s it stays inside 0..1 and has a width at 0 and at 100 %.
    """
    if num_trials == 0:
        return 0.0, 1.0
    n, p = num_trials, num_successes / num_trials
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


# ---------------------------------------------------------------- figures


def confusion_figure(confusion: Tensor, call_names: Sequence[str]) -> Figure:
    """Draw `CallMetrics.confusion_matrix()`, (N, N + 2): only names that occur, mistakes in red.

    Shades are shares of the row, under a square root so that rare mistakes can be seen.
    """
    from matplotlib.figure import Figure

    confusion = confusion.cpu()
    labels = [
        f"{n.removeprefix(INCOMPLETE_PREFIX)} …" if n.startswith(INCOMPLETE_PREFIX) else n
        for n in call_names
    ]
    labels += ["unknown", "unreadable"]
    rows = [i for i in range(len(call_names)) if confusion[i].any()]
    columns = [j for j in range(len(labels)) if j in rows or confusion[:, j].any()]
    figure = Figure(figsize=(3.2 + 0.3 * len(columns), 2.6 + 0.26 * len(rows)), layout="tight")
    axes = figure.subplots()
    if not rows:
        axes.set_title("no examples")
        return figure
    counts = confusion[rows][:, columns]
    shades = (counts / counts.sum(1, keepdim=True)).sqrt()
    is_right = torch.tensor([[i == j for j in columns] for i in rows])
    for cmap, is_drawn in (("Blues", is_right), ("Reds", ~is_right)):
        drawn = shades.masked_fill(~is_drawn | (counts == 0), math.nan).numpy()
        axes.pcolormesh(drawn, cmap=cmap, vmin=0, vmax=1.2, edgecolors="#eeeeee", lw=0.5)
    for i, j in counts.nonzero().tolist():
        color = "white" if shades[i, j] > 0.7 else "black"
        text = f"{int(counts[i, j])}"
        axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=color, fontsize=7)
    at_columns, at_rows = ([k + 0.5 for k in range(len(names))] for names in (columns, rows))
    axes.set_xticks(at_columns, [labels[j] for j in columns], rotation=90, fontsize=8)
    axes.set_yticks(at_rows, [labels[i] for i in rows], fontsize=8)
    axes.set(xlabel="predicted", ylabel="expected (… is an incomplete request)")
    axes.invert_yaxis()
    return figure
