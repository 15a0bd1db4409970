"""The registry: which functions there are, and whether a call satisfies their schema.

A registry is read from one YAML file: each function as an OpenAI-style tool (name, description,
JSON-Schema parameters) with the sentences by which people ask for it beside it. How a call is
written and compared is calls.py's business. No tokens, no prompt, no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fc_lightning.calls import INCOMPLETE_PREFIX, FunctionCall, value_key

VEHICLE = Path(__file__).parent / "assets" / "vehicle.yaml"

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, if libyaml is there

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
}


class RegistryError(ValueError):
    """A registry file that can't be used; the message says where and what to do."""


@dataclass(frozen=True)
class ParameterSpec:
    """One argument of a function. For an array, `enum` and the bounds are those of its items."""

    name: str
    type: str
    description: str = ""
    enum: tuple[Scalar, ...] = ()
    item_type: str = ""
    minimum: float | None = None
    maximum: float | None = None
    is_required: bool = False
    is_verbatim: bool = False  # x-verbatim: its text stands in the command

    def type_violation(self, value: Any) -> str | None:
        """Why `value` has the wrong type, or None. Elements of an array are not looked at."""
        if not _has_type(value, self.type):
            article = "an" if self.type in ("array", "integer") else "a"
            return f"{self.name} must be {article} {self.type}, not {value!r}"
        return None

    def item_violation(self, item: Any) -> str | None:
        """Why a scalar, or one element of an array, is outside type, enum or bounds, or None."""
        item_type = self.item_type or self.type
        if not _has_type(item, item_type):
            return f"{self.name}: {item!r} is no {item_type}"
        if self.enum and item not in self.enum:
            return f"{self.name}: {item!r} is not one of {', '.join(map(str, self.enum))}"
        if self.minimum is not None and item < self.minimum:
            return f"{self.name}: {item!r} is below {self.minimum:g}"
        if self.maximum is not None and item > self.maximum:
            return f"{self.name}: {item!r} is above {self.maximum:g}"
        return None

    def violation(self, value: Any) -> str | None:
        """Why `value` does not satisfy the schema, or None if it does."""
        if problem := self.type_violation(value):
            return problem
        if not isinstance(value, list):
            return self.item_violation(value)
        if len(set(map(value_key, value))) < len(value):
            return f"{self.name}: an element is repeated in {value!r}"
        return next(filter(None, map(self.item_violation, value)), None)

    def canonical(self, value: Value) -> Value:
        """The value as this package writes it: arrays in enum order, 21.0 as 21."""
        if isinstance(value, list):
            order = {value_key(choice): i for i, choice in enumerate(self.enum)}
            plain: list[Scalar] = [_plain(v) for v in value]
            return sorted(plain, key=lambda v: order.get(value_key(v), len(order)))
        return _plain(value)


@dataclass(frozen=True)
class FunctionSpec:
    """A function's schema, parameters in schema order, and the raw sentences beside it."""

    name: str
    description: str
    parameters: tuple[ParameterSpec, ...]
    sentences: Any = field(default=None, compare=False, repr=False)

    @cached_property
    def by_name(self) -> dict[str, ParameterSpec]:
        return {p.name: p for p in self.parameters}

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters if p.is_required)


@dataclass(frozen=True)
class Registry:
    """All functions of a domain, in file order.

    `source` is the parsed YAML file (schemas and sentences, whole), which travels inside
    checkpoints so that a fine-tuned model knows its functions. `where` is what messages call it.
    """

    functions: tuple[FunctionSpec, ...]
    source: Mapping[str, Any] = field(compare=False, repr=False)
    where: str = field(default="registry", compare=False, repr=False)

    @cached_property
    def by_name(self) -> dict[str, FunctionSpec]:
        return {f.name: f for f in self.functions}

    @cached_property
    def call_names(self) -> tuple[str, ...]:
        """Every name a call may bear: each function, then the incomplete forms."""
        incomplete = [INCOMPLETE_PREFIX + f.name for f in self.functions if f.required]
        return (*self.by_name, *incomplete)

    def spec(self, call_name: str) -> FunctionSpec | None:
        """The function behind a call's name, its `possibly_incomplete_` form included."""
        if call_name not in self.call_names:
            return None
        return self.by_name[call_name.removeprefix(INCOMPLETE_PREFIX)]

    def violations(self, call: FunctionCall) -> list[str]:
        """Everything that is wrong with a call by its schema; empty if it is valid.

        An incomplete call must leave at least one required argument out, written as ''.
        """
        spec = self.spec(call.name)
        if spec is None:
            return [f"unknown function {call.name!r}"]
        arguments, known = call.arguments, spec.by_name
        problems = [f"{spec.name} has no argument {n!r}" for n in arguments if n not in known]
        problems += [f"{spec.name} needs {n!r}" for n in spec.required if n not in arguments]
        is_left_out = {
            n: n in call.missing and known[n].is_required for n in arguments if n in known
        }
        if not call.is_complete and not any(is_left_out.values()):
            problems.append(f"{call.name} leaves no required argument out")
        checked = (
            known[n].violation(arguments[n]) for n, left_out in is_left_out.items() if not left_out
        )
        return problems + [problem for problem in checked if problem]

    def canonical(self, call: FunctionCall) -> FunctionCall:
        """The same call with keys in schema order and arrays in enum order."""
        spec = self.spec(call.name)
        if spec is None:
            return call
        unknown = [name for name in call.arguments if name not in spec.by_name]
        known = {
            name: parameter.canonical(call.arguments[name])
            for name, parameter in spec.by_name.items()
            if name in call.arguments
        }
        arguments = known | {name: call.arguments[name] for name in unknown}
        return FunctionCall(call.name, arguments, call.confidence, call.raw)


def load_registry(path: str | Path | None = None) -> Registry:
    """Read a domain file; without a path, the vehicle that ships with the package.

    The file's `functions` is a list of OpenAI function objects, each with `sentences` beside its
    schema. With `tools: tools.json` (an OpenAI `tools` list, looked up next to the file), a
    function may leave out description and parameters, and the JSON list supplies them.

    Raises:
        RegistryError: what is wrong, in which function, and what to do.
    """
    path = Path(path) if path is not None else VEHICLE
    source = _read_mapping(path)
    if "tools" in source:
        source = _with_tools(source, path.parent / str(source["tools"]), path)
    return registry_from_source(source, path)


def registry_from_source(source: Mapping[str, Any], where: str | Path) -> Registry:
    """Build the registry from a file's parsed content, as it also travels in checkpoints."""
    entries = source.get("functions")
    if not isinstance(entries, list) or not entries:
        raise RegistryError(f"{where}: needs a list 'functions' with at least one function")
    for key, kind in (("lists", dict), ("expansion_rules", dict), ("carriers", list)):
        if not isinstance(source.get(key) or kind(), kind):
            raise RegistryError(f"{where}: {key} must be a {kind.__name__}")
    functions = tuple(_function_spec(entry, where) for entry in entries)
    names = [f.name for f in functions]
    if repeated := {n for n in names if names.count(n) > 1}:
        raise RegistryError(f"{where}: function {min(repeated)!r} is defined twice")
    return Registry(functions, source, str(where))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        source = yaml.load(path.read_text(encoding="utf-8"), _YamlLoader)
        odd_key = next(_odd_keys(source), None)
    except OSError as error:
        raise RegistryError(f"{path}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RegistryError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(source, dict):
        raise RegistryError(
            f"{path}: must be a mapping with 'functions', not a {type(source).__name__}"
        )
    if odd_key is not None:
        raise RegistryError(f"{path}: key {odd_key} must be a string (put quotes around it)")
    return source


def _odd_keys(node: Any, at: str = "") -> Iterator[str]:
    """Where mappings have keys that are no strings: in YAML 1.1, a bare `on` is a boolean."""
    entries = node.items() if isinstance(node, dict) else ()
    yield from (f"{at}{key}" for key, _ in entries if not isinstance(key, str))
    for key, value in enumerate(node) if isinstance(node, list) else entries:
        yield from _odd_keys(value, f"{at}{key}.")


def _with_tools(source: dict[str, Any], tools_path: Path, where: Path) -> dict[str, Any]:
    try:
        tools = json.loads(tools_path.read_text(encoding="utf-8"))
        schemas = {t.get("function", t)["name"]: t.get("function", t) for t in tools}
    except OSError as error:
        raise RegistryError(
            f"{where}: tools {tools_path} can't be read ({error.strerror})"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RegistryError(f"{tools_path}: not an OpenAI tools list of named functions") from None
    try:
        beside = {entry["name"]: entry for entry in source.get("functions") or []}
    except (KeyError, TypeError):
        raise RegistryError(f"{where}: each entry of 'functions' needs a 'name'") from None
    if unknown := beside.keys() - schemas.keys():
        raise RegistryError(f"{where}: function {min(map(str, unknown))!r} is not in {tools_path}")
    merged = [schema | beside.get(name, {}) for name, schema in schemas.items()]
    return {k: v for k, v in source.items() if k != "tools"} | {"functions": merged}


def _function_spec(entry: Any, where: str | Path) -> FunctionSpec:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
        raise RegistryError(
            f"{where}: each function needs a 'name' such as set_temperature, not {name!r}"
        )
    if name.startswith(INCOMPLETE_PREFIX):
        raise RegistryError(f"{where}: {name!r} must not start with {INCOMPLETE_PREFIX!r}")
    schema = entry.get("parameters") or {}
    try:
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(required, list):
            raise RegistryError(f"required must be a list, not {required!r}")
        if unknown := [r for r in required if r not in properties]:
            raise RegistryError(f"required argument {unknown[0]!r} is not among its properties")
        parameters = tuple(_parameter_spec(n, s, n in required) for n, s in properties.items())
    except RegistryError as error:
        raise RegistryError(f"{where}: function {name!r}: {error}") from None
    except (AttributeError, TypeError):
        raise RegistryError(
            f"{where}: function {name!r}: 'parameters' must be a JSON Schema object"
        ) from None
    return FunctionSpec(name, str(entry.get("description", "")), parameters, entry.get("sentences"))


def _parameter_spec(name: str, schema: Mapping[str, Any], is_required: bool) -> ParameterSpec:
    kind = schema.get("type", "string" if "enum" in schema else None)
    if kind not in [*_PYTHON_TYPES]:  # it may be a list
        raise RegistryError(f"argument {name!r} has type {kind!r}; use {', '.join(_PYTHON_TYPES)}")
    items = schema.get("items") or {} if kind == "array" else schema
    item_type = str(items.get("type", "string")) if kind == "array" else ""
    if item_type == "array" or (item_type and item_type not in _PYTHON_TYPES):
        raise RegistryError(f"argument {name!r}: items of type {item_type!r} are not supported")
    if not isinstance(name, str):
        raise RegistryError(f"argument {name!r} must be a string (put quotes around it)")
    enum = items.get("enum") or []
    if not isinstance(enum, list):
        raise RegistryError(f"argument {name!r}: enum must be a list, not {enum!r}")
    parameter = ParameterSpec(
        name,
        kind,
        str(schema.get("description", "")),
        tuple(enum),
        item_type,
        items.get("minimum"),
        items.get("maximum"),
        is_required,
        schema.get("x-verbatim", False),
    )
    if problem := next(_problems(parameter, schema), None):
        raise RegistryError(f"argument {name!r}: {problem}")
    return parameter


def _problems(parameter: ParameterSpec, schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an argument's enum, bounds and x-verbatim; later ones need the earlier."""
    kind, enum = parameter.item_type or parameter.type, parameter.enum
    low, high = parameter.minimum, parameter.maximum
    if parameter.type == "array" and (outside := schema.keys() & {"enum", "minimum", "maximum"}):
        yield f"{min(outside)} of an array must stand in its items; move it there"
    for bound, value in (("minimum", low), ("maximum", high)):
        if value is not None and not _has_type(value, "number"):
            yield f"{bound} {value!r} is no number; give one or leave it out"
        if value is not None and kind not in ("integer", "number"):
            yield f"{bound} is for numbers, not for a {kind}; leave it out"
    if low is not None and high is not None and low > high:
        yield f"minimum {low!r} is above maximum {high!r}; change one"
    counts = Counter(map(value_key, enum))
    for choice in enum:
        # YAML 1.1 reads a bare on, off, yes or no as a boolean: the commonest slip in such files.
        if not _has_type(choice, kind):
            yield f"enum value {choice!r} is no {kind} (put quotes around on, off, yes and no)"
        if choice == "":
            yield "enum value '' would mean that nothing was said; leave it out"
        if counts[value_key(choice)] > 1:
            yield f"enum value {choice!r} equals another (case and spaces don't count); drop one"
        if parameter.item_violation(choice):
            yield f"enum value {choice!r} is outside minimum and maximum"
    if not isinstance(parameter.is_verbatim, bool) or (
        parameter.is_verbatim and (parameter.type != "string" or enum)
    ):
        yield "x-verbatim: true is for strings without enum only"
    if parameter.is_verbatim and set(parameter.name) & set("'\"\\"):
        yield "x-verbatim: true needs a name without quotes and backslashes"


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES[kind]) and (kind == "boolean") == isinstance(value, bool)


def _plain(value: Scalar) -> Scalar:
    return int(value) if isinstance(value, float) and value.is_integer() else value
