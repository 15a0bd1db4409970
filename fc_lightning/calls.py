"""A function call: what it is, and the one place that knows how it is written.

Calls are rendered, parsed and compared here, without a schema. Which functions there are, and
whether a call satisfies them, is functions.py's business. No tokens, no prompt, no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INCOMPLETE_PREFIX = "possibly_incomplete_"


class UnreadableCall(ValueError):
    """Text that holds no readable function call."""


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
        """Whether all that the function requires was said."""
        return not self.name.startswith(INCOMPLETE_PREFIX)

    @property
    def missing(self) -> tuple[str, ...]:
        """The required arguments of an incomplete request that must be asked for."""
        if self.is_complete:
            return ()
        return tuple(name for name, value in self.arguments.items() if value == "")

    def __str__(self) -> str:
        """The call the way a programmer would write it: set_fan_speed(speed='low')."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({arguments})"


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
