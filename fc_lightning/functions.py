"""The registry of functions and the one place that knows how a call is written.

A registry is read from one YAML file: each function as an OpenAI-style tool (name, description,
JSON-Schema parameters) with the sentences by which people ask for it beside it. Calls are parsed,
rendered, checked against their schema and compared here. No tokens, no prompt, no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

INCOMPLETE_PREFIX = "possibly_incomplete_"
VEHICLE = Path(__file__).parent / "assets" / "vehicle.yaml"

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


class UnreadableCall(ValueError):
    """Text that holds no readable function call."""


# ---------------------------------------------------------------- the registry


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

    def type_violation(self, value: Any) -> str | None:
        """Why `value` has the wrong type, or None. Elements of an array are not looked at."""
        if not _has_type(value, self.type):
            return f"{self.name} must be a {self.type}, not {value!r}"
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
    functions = tuple(_function_spec(entry, where) for entry in entries)
    names = [f.name for f in functions]
    if repeated := {n for n in names if names.count(n) > 1}:
        raise RegistryError(f"{where}: function {min(repeated)!r} is defined twice")
    return Registry(functions, source, str(where))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        source = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RegistryError(f"{path}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RegistryError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(source, dict):
        raise RegistryError(
            f"{path}: must be a mapping with 'functions', not a {type(source).__name__}"
        )
    return source


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
    if kind not in _PYTHON_TYPES:
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
    # YAML 1.1 reads a bare on, off, yes or no as a boolean: the commonest slip in such files.
    if wrong := [v for v in enum if not _has_type(v, item_type or kind)]:
        raise RegistryError(
            f"argument {name!r}: enum value {wrong[0]!r} is no {item_type or kind}"
            " (put quotes around on, off, yes and no)"
        )
    bounds = {bound: items.get(bound) for bound in ("minimum", "maximum")}
    for bound, value in bounds.items():
        if value is not None and not _has_type(value, "number"):
            raise RegistryError(f"argument {name!r}: {bound} {value!r} is no number")
    description = str(schema.get("description", ""))
    return ParameterSpec(
        name, kind, description, tuple(enum), item_type, is_required=is_required, **bounds
    )


# ---------------------------------------------------------------- calls


@dataclass(frozen=True)
class FunctionCall:
    """A name and its arguments, as said.

    An incomplete request has the name `possibly_incomplete_` + function, and '' for each required
    argument that was not said. `confidence` (a probability) and `raw` (the model's own text) are
    there when a model made the call; they don't take part in ==.
    """

    name: str
    arguments: Mapping[str, Any]
    confidence: float | None = field(default=None, compare=False)
    raw: str = field(default="", compare=False, repr=False)

    @property
    def function(self) -> str:
        """The function's name, without the mark of an incomplete request."""
        return self.name.removeprefix(INCOMPLETE_PREFIX)

    @property
    def is_complete(self) -> bool:
        return not self.name.startswith(INCOMPLETE_PREFIX)

    @property
    def missing(self) -> tuple[str, ...]:
        """The required arguments of an incomplete request that must be asked for."""
        if self.is_complete:
            return ()
        return tuple(name for name, value in self.arguments.items() if value == "")


def render_call(call: FunctionCall) -> str:
    """Write a call: valid JSON around a valid Python dict literal, keys in the order given.

    >>> print(render_call(FunctionCall("play_music", {"track": "don't stop"})))
    <functioncall> {"name": "play_music", "arguments": "{'track': \\"don't stop\\"}"}
    """
    literal = repr(dict(call.arguments))
    body = json.dumps({"name": call.name, "arguments": literal}, ensure_ascii=False)
    return f"<functioncall> {body} "


def parse_call(text: str) -> FunctionCall:
    """Read a call from an assistant's text, whatever stands before it; only markers may follow.

    Reads the clean form that `render_call` writes, and what other people's files hold: `true` and
    `false` in the literal, unescaped double quotes inside the outer JSON string, arguments as a
    plain JSON object.

    Raises:
        UnreadableCall: there is no call, or it is cut short, too long or nested too deep.
    """
    if len(text) > _MAX_CALL_CHARS:
        raise UnreadableCall(
            f"a call of {len(text):,} characters; at most {_MAX_CALL_CHARS:,} are read"
        )
    body = text if text.lstrip().startswith("{") else text.partition("<functioncall>")[2]
    body = _without_closing_markers(body).strip()
    name, arguments = _parse_clean(body) or _parse_loose(body)
    return FunctionCall(name, arguments, raw=text)


_MAX_CALL_CHARS = 20_000
_MAX_DEPTH = 8
_LOOSE = re.compile(
    r"""\{\s*"name"\s*:\s*"(?P<name>[^"]*)"\s*,\s*"arguments"\s*:\s*"(?P<literal>.*)"\s*\}\s*\Z""",
    re.DOTALL,
)
_LITERAL_TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
    r"""|(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<word>[A-Za-z]+)|(?P<mark>[\[\]{},:]))""",
    re.DOTALL,
)
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_SHORT_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_SHORT_ESCAPES |= {mark: mark for mark in "'\"\\/"}


def _without_closing_markers(text: str) -> str:
    while True:
        shorter = text.rstrip().removesuffix("<|endoftext|>").removesuffix("<|im_end|>")
        if shorter == text:
            return text
        text = shorter


def _parse_clean(body: str) -> tuple[str, dict[str, Any]] | None:
    try:
        outer = json.loads(body)
        if isinstance(outer, dict) and isinstance(outer.get("arguments"), dict):
            # Back to text, so that one reader bounds depth and numbers however they were written.
            outer["arguments"] = json.dumps(outer["arguments"], ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(outer, dict) or not isinstance(outer.get("name"), str):
        raise UnreadableCall('a call needs a "name"')
    arguments = outer.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse_literal(arguments)
    if not isinstance(arguments, dict):
        raise UnreadableCall(f"the arguments are no dict but {arguments!r:.60}")
    return outer["name"], arguments


def _parse_loose(body: str) -> tuple[str, dict[str, Any]]:
    """Read a call whose literal holds double quotes that the outer JSON string doesn't escape."""
    match = _LOOSE.match(body)
    if match is None:
        raise UnreadableCall(f"no call in {body!r:.80}")
    arguments = _parse_literal(match["literal"])
    if not isinstance(arguments, dict):
        raise UnreadableCall(f"the arguments are no dict but {arguments!r:.60}")
    return match["name"], arguments


def _parse_literal(text: str) -> Any:
    """Read a Python (or JSON) literal of dicts, lists and scalars, without `eval`."""
    tokens, end = [], 0
    while match := _LITERAL_TOKEN.match(text, end):
        tokens.append((match.lastgroup or "", match[match.lastgroup or 0]))
        end = match.end()
    if text[end:].strip():
        raise UnreadableCall(f"can't read {text[end:].strip()!r:.40} in the arguments")
    tokens.append(("end", ""))
    value, position = _read_value(tokens, 0, _MAX_DEPTH)
    if tokens[position][0] != "end":
        raise UnreadableCall(f"{tokens[position][1]!r:.40} after the end of the arguments")
    return value


def _read_value(tokens: list[tuple[str, str]], i: int, depth: int) -> tuple[Any, int]:
    kind, text = tokens[i]
    if kind == "string":
        return _read_string(text[1:-1]), i + 1
    if kind == "number":
        return _read_number(text), i + 1
    if kind == "word" and text in _WORDS:
        return _WORDS[text], i + 1
    if kind != "mark" or text not in "[{":
        raise UnreadableCall(
            f"expected a value, not {text!r:.40}" if text else "the arguments end too soon"
        )
    if depth == 0:
        raise UnreadableCall(f"arguments nested deeper than {_MAX_DEPTH}")
    return _read_container(tokens, i + 1, depth - 1, is_dict=text == "{")


def _read_container(
    tokens: list[tuple[str, str]], i: int, depth: int, *, is_dict: bool
) -> tuple[Any, int]:
    items: list[Any] = []
    closing = ("mark", "}" if is_dict else "]")
    while tokens[i] != closing:
        item, i = _read_value(tokens, i, depth)
        if is_dict:
            if not isinstance(item, str) or tokens[i] != ("mark", ":"):
                raise UnreadableCall(f"expected 'name': value at {item!r:.40}")
            value, i = _read_value(tokens, i + 1, depth)
            item = (item, value)
        items.append(item)
        if tokens[i] == ("mark", ","):
            i += 1
        elif tokens[i] != closing:
            raise UnreadableCall(f"expected {closing[1]!r} or ',' before {tokens[i][1]!r:.40}")
    if not is_dict:
        return items, i + 1
    if len(dict(items)) < len(items):
        raise UnreadableCall("an argument is given twice")
    return dict(items), i + 1


def _read_string(text: str) -> str:
    value = _ESCAPE.sub(_unescape, text)
    # JSON escapes an emoji as two surrogates: join them, and let no lone one out.
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _read_number(text: str) -> int | float:
    try:
        number = float(text) if re.search(r"[.eE]", text) else int(text)
    except ValueError:  # an int of more than 4,300 digits
        raise UnreadableCall(f"number {text:.20}... is too long") from None
    if not math.isfinite(number):
        raise UnreadableCall(f"number {text} is too large")
    return number


def _unescape(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3]
    if code is None:
        return _SHORT_ESCAPES.get(match[4], match[0])
    return chr(int(code, 16)) if int(code, 16) <= 0x10FFFF else match[0]


# ---------------------------------------------------------------- equality


def calls_equal(expected: FunctionCall, predicted: FunctionCall) -> bool:
    """Same name, same set of arguments, equal values; defaults are not filled in."""
    return (
        expected.name == predicted.name
        and expected.arguments.keys() == predicted.arguments.keys()
        and all(values_equal(v, predicted.arguments[n]) for n, v in expected.arguments.items())
    )


def values_equal(expected: Any, predicted: Any) -> bool:
    """Numbers by value (a boolean is none), strings by letters, arrays as sets without repeats."""
    if not (isinstance(expected, list) and isinstance(predicted, list)):
        return scalars_equal(expected, predicted)
    sets = [set(map(value_key, value)) for value in (expected, predicted)]
    return sets[0] == sets[1] and len(sets[0]) == len(expected) == len(predicted)


def scalars_equal(expected: Any, predicted: Any) -> bool:
    """1 equals 1.0 but not True; "Low  Beam" equals "low beam"."""
    return value_key(expected) == value_key(predicted)


def value_key(value: Any) -> tuple[str, Any]:
    """A hashable key, the same for values that count as equal."""
    if isinstance(value, str):
        return "string", " ".join(value.casefold().split())
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, int | float):
        return "number", value
    return "other", repr(value)


def _has_type(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _PYTHON_TYPES[kind]) and (kind == "boolean") == isinstance(value, bool)


def _plain(value: Scalar) -> Scalar:
    return int(value) if isinstance(value, float) and value.is_integer() else value
