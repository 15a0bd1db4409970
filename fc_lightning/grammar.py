"""Which tokens may come next so that a response is always a valid call, and which must come.

A registry is written as a grammar of whole responses, in exactly the text that `render_call`
writes, and compiled by llguidance. `compile_grammar` returns the response's first `Place`; decoding
walks from there. Places are shared by all rows and calls, so what a mask costs is paid once.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding
from torch import Tensor

from fc_lightning.calls import FunctionCall, render_call
from fc_lightning.chat import RESPONSE_END, RESPONSE_START
from fc_lightning.functions import FunctionSpec, ParameterSpec, Registry, Scalar, Value
from fc_lightning.tokenizer import END_OF_TEXT, PADDED_VOCAB_SIZE, get_encoding

MAX_TEXT_TOKENS = 240  # of a free string
_MAX_TEXT_LETTERS = 80
_LETTER = r"[^'\"\\\p{C}\p{Z}]"  # what repr writes as it is, but for the space
_NARROW = r"[^'\"\\\p{C}\p{Z}\u{800}-\u{10FFFF}]"  # two bytes, so two tokens at most
_ASCII = r"[!#-&(-\[\]-~]"
_MAX_ITEMS = 8  # of an array without enum
_SPARE_TOKENS = 8  # END_OF_TEXT, and what neighbours may cost each other at their seam
_FEW = 64  # ways of a word that are looked into; more are found in numbers and free text only
_MANY = 256  # from so many allowed ids on, a mask is cheaper than a list


# ---------------------------------------------------------------- the walk through a response


class Place:
    """One place in a response: the ids `forced` there, and the ids `allowed` after them.

    Only choices of the training tokenisation are offered, as long as they are few: where
    "increase" may follow, "in" may not, so that it needs one decision and not two. Inside a free
    string any token of the text is allowed.
    """

    def __init__(self, matcher: LLMatcher, ids: list[int], text_end: int) -> None:
        """The place after `ids`, whose first `text_end` end with the last token of free text."""
        self.forced, self.allowed = _advance(matcher, ids, text_end)
        self.ids = [*ids, *self.forced]  # the response up to what is allowed
        self._matcher, self._text_end = matcher, text_end
        self._is_text = self.allowed.dtype == torch.bool
        # Texts in single quotes: how a response goes on does not depend on what stands in them.
        self._is_single = self._is_text and _ends_with_single_quote(self.ids)
        self._next: dict[int, Place] = {}
        self._after_text: dict[int, Place] = {}  # of all texts that begin here

    def after(self, token: int) -> Place:
        """The place that an allowed token leads to; remembered unless inside a free string."""
        if (place := self._next.get(token)) is None:
            ids = [*self.ids, token]
            matcher = _consume(self._matcher.deep_copy(), [token])
            place = Place(matcher, ids, len(ids) if self._is_text else self._text_end)
            is_over = self._is_single and b"'" in get_encoding().decode_single_token_bytes(token)
            if is_over or not self._is_text:
                self._next[token] = place
            elif place._is_text:
                place._is_single = self._is_single
                place._next = place._after_text = self._after_text
        return place


def compile_grammar(registry: Registry, *, max_text_tokens: int = MAX_TEXT_TOKENS) -> Place:
    """The first place of a response that calls one of the registry's functions.

    Raises:
        ValueError: an argument that no value satisfies, such as bounds with no number between.
    """
    matcher = LLMatcher(_tokenizer(), write_grammar(registry, max_text_tokens=max_text_tokens))
    _check(matcher)
    return Place(matcher, [], text_end=0)


def max_response_tokens(registry: Registry, *, max_text_tokens: int = MAX_TEXT_TOKENS) -> int:
    """How many tokens the longest response that the grammar allows can take."""
    encoding, longest = get_encoding(), 0
    for name in registry.call_names:
        spec = registry.spec(name)
        assert spec is not None, name
        values = {p.name: _longest(p) for p in spec.parameters}
        response = f"{RESPONSE_START}{render_call(FunctionCall(name, values))}{RESPONSE_END}"
        free = max_text_tokens * sum(map(_num_free_texts, spec.parameters))
        longest = max(longest, len(encoding.encode_ordinary(response)) + free)
    return longest + _SPARE_TOKENS


def _longest(parameter: ParameterSpec) -> Value:
    """A value that takes as many tokens as any other, free text left empty."""
    if parameter.type == "array":
        return list(parameter.enum) or [_longest_scalar(parameter)] * _MAX_ITEMS
    return _longest_scalar(parameter)


def _num_free_texts(parameter: ParameterSpec) -> int:
    if parameter.enum or "string" not in (parameter.type, parameter.item_type):
        return 0
    return _MAX_ITEMS if parameter.type == "array" else 1


def _longest_scalar(parameter: ParameterSpec) -> Scalar:
    if parameter.enum:
        return max(parameter.enum, key=lambda v: len(get_encoding().encode_ordinary(repr(v))))
    kind = parameter.item_type or parameter.type
    if kind == "boolean":
        return False
    # Thirteen letters, as a number may be written; each letter may be a token of its own.
    return "" if kind == "string" else " 1 2 3 4 5 6 7 8 9 0 1 2 3"


@functools.cache
def _tokenizer() -> LLTokenizer:
    # Tokens that consist of plain letters are allowed or not by the slice: 0.02 ms a mask, not 0.3.
    slices = [f"({_NARROW}| ){{1,{n}}}" for n in (15, 5)]
    return lltokenizer_from_encoding(get_encoding(), n_vocab=PADDED_VOCAB_SIZE, slices=slices)


def _advance(matcher: LLMatcher, ids: list[int], text_end: int) -> tuple[list[int], Tensor]:
    """Consume what is forced; the forced ids, and the ids (K,) or mask (V,) allowed then."""
    forced: list[int] = []
    while not matcher.is_stopped():
        run = matcher.compute_ff_tokens()
        if not run:
            mask = _mask(matcher)
            if np.count_nonzero(mask) > _MANY:
                return forced, torch.from_numpy(mask.copy())
            choices = mask.nonzero()[0].tolist()
            assert choices, f"no way on after {get_encoding().decode([*ids, *forced])!r}"
            run = [
                token
                for token in choices
                if _may_be_canonical(matcher, [*ids, *forced], token, text_end)
            ] or choices
            if len(run) > 1:
                return forced, torch.tensor(run)
        _consume(matcher, run)
        forced += run
    return [*forced, END_OF_TEXT], torch.tensor([], dtype=torch.long)


def _may_be_canonical(matcher: LLMatcher, ids: list[int], token: int, text_end: int) -> bool:
    """Whether the training tokenisation of some response goes on with `token` after `ids`.

    Sure as soon as the bytes forced from there reach into the next word: tokens never span two.
    A model may have cut free text in a way of its own, so what follows is judged by itself.
    """
    matcher, ids = _consume(matcher.deep_copy(), [token]), [*ids, token]
    ahead = matcher.compute_ff_bytes()
    if matcher.is_stopped() or _is_settled(get_encoding().decode_bytes(ids), ahead):
        return _is_start(ids[text_end:], ahead)
    choices = _mask(matcher).nonzero()[0]
    return len(choices) > _FEW or any(
        _may_be_canonical(matcher, ids, choice, text_end) for choice in choices.tolist()
    )


def _is_start(ids: list[int], ahead: bytes) -> bool:
    """Whether tokenising the text of `ids` and what is ahead begins with `ids`."""
    text = get_encoding().decode_bytes(ids) + ahead
    whole = text.decode(errors="ignore")  # it may end within a character
    return get_encoding().encode_ordinary(whole)[: len(ids)] == ids


def _is_settled(text: bytes, ahead: bytes) -> bool:
    """Whether a word of GPT-2's pattern ends at or after the end of `text`, within `ahead`."""
    num_letters = len(text.decode(errors="ignore"))
    letters = (text + ahead).decode(errors="ignore")[num_letters - 1 :]
    return any(a != " " and _kind(a) != _kind(b) for a, b in itertools.pairwise(letters))


def _kind(letter: str) -> str:
    return next((k for k in ("isalpha", "isnumeric", "isspace") if getattr(letter, k)()), "mark")


def _ends_with_single_quote(ids: list[int]) -> bool:
    """Not with one inside a text in double quotes."""
    return re.search(rb"[^\"]'$", get_encoding().decode_bytes(ids[-2:])) is not None


def _mask(matcher: LLMatcher) -> np.ndarray:
    """Which ids are allowed next, (V,)."""
    return np.frombuffer(matcher.compute_logit_bias(), dtype=np.bool_)


def _consume(matcher: LLMatcher, ids: list[int]) -> LLMatcher:
    matcher.consume_tokens(ids)
    _check(matcher)
    return matcher


def _check(matcher: LLMatcher) -> None:
    # llguidance reports errors by a state, never by an exception.
    if matcher.is_error():
        problem = matcher.get_error().partition("\n")[0]
        raise ValueError(f"the grammar can't be followed: {problem}")


# ---------------------------------------------------------------- the grammar of a registry


def write_grammar(registry: Registry, *, max_text_tokens: int = MAX_TEXT_TOKENS) -> str:
    """All responses that call a function of the registry, in llguidance's Lark notation.

    Keys stand in schema order and arrays in enum order, without repeats; an incomplete call
    leaves at least one required argument ''.
    """
    opening, closing = render_call(FunctionCall("@", {})).split("@")
    before_arguments, end = closing.split("{}")
    calls, rules = [], list(_text_rules(max_text_tokens))
    for number, name in enumerate(registry.call_names):
        spec = registry.spec(name)
        assert spec is not None, name
        first, argument_rules = _argument_rules(f"call{number}", spec, spec.name != name)
        calls.append(f"{_literal(name + before_arguments + '{')} {first}")
        rules += argument_rules
    start = f"{_literal(RESPONSE_START + opening)} call {_literal('}' + end + RESPONSE_END)}"
    return "\n".join([f"start: {start}", f"call: {' | '.join(calls)}", *rules])


def _argument_rules(rule: str, spec: FunctionSpec, is_incomplete: bool) -> tuple[str, list[str]]:
    """The rule that writes all of a function's arguments, and the rules that it is made of."""
    values = [f"{rule}_value{i}" for i in range(len(spec.parameters))]
    rules = [*itertools.chain(*map(_value_rules, values, spec.parameters))]

    @functools.cache
    def rest(i: int, is_first: bool, must_omit: bool) -> str | None:
        """The rule for the parameters from i on; None if there is no way to end from there."""
        is_needed = any(p.is_required for p in spec.parameters[i:])
        ways = [] if must_omit or is_needed else ['""']
        for j, parameter in enumerate(spec.parameters[i:], i):
            key = _written({parameter.name: ""})[1:-3]
            key = key if is_first else f", {key}"
            if tail := rest(j + 1, False, must_omit):
                ways.append(f"{_literal(key)} {values[j]} {tail}")
            may_omit = is_incomplete and parameter.is_required
            if may_omit and (tail := rest(j + 1, False, False)):
                # Not in one with the key: llguidance would read on there, and miss other texts.
                ways.append(f"{_literal(key)} {_literal(_written(''))} {tail}")
            if parameter.is_required:
                break
        if not ways:
            return None
        name = f"{rule}_{i}_{is_first:d}_{must_omit:d}"
        rules.append(f"{name}: {' | '.join(ways)}")
        return name

    first = rest(0, True, is_incomplete)
    assert first is not None, spec.name
    return first, rules


def _value_rules(rule: str, parameter: ParameterSpec) -> list[str]:
    """The rule for one argument's value; an array's items stand in order, each at most once."""
    if parameter.type != "array":
        return [f"{rule}: {_scalar(parameter, parameter.type)}"]
    if not parameter.enum:
        item = _scalar(parameter, parameter.item_type)
        return [
            f'{rule}: "[" {rule}_item (", " {rule}_item){{0,{_MAX_ITEMS - 1}}} "]"',
            f"{rule}_item: {item}",
        ]
    items = [_literal(_written(choice)) for choice in parameter.enum]
    rules = [f'{rule}: "[" ({_ways_on(rule, items, 0)})']
    for i in range(1, len(items)):
        rules.append(f'{rule}_{i}: "]" | ", " ({_ways_on(rule, items, i)})')
    return [*rules, f'{rule}_{len(items)}: "]"']


def _ways_on(rule: str, items: list[str], start: int) -> str:
    return " | ".join(f"{item} {rule}_{i + 1}" for i, item in enumerate(items) if i >= start)


def _scalar(parameter: ParameterSpec, kind: str) -> str:
    """The expression for one scalar value."""
    if parameter.enum:
        return " | ".join(_literal(_written(parameter.canonical(v))) for v in parameter.enum)
    if kind == "boolean":
        return " | ".join(_literal(_written(v)) for v in (True, False))
    if kind == "string":
        return "text"
    pattern = number_pattern(parameter.minimum, parameter.maximum, is_integer=kind == "integer")
    if not pattern:
        raise ValueError(
            f"{parameter.name}: no {kind} lies between {parameter.minimum} and {parameter.maximum} "
            "that has at most two decimals, and nine digits where a bound is missing"
        )
    return f"/{pattern}/"


def _text_rules(max_tokens: int) -> Iterator[str]:
    """Non-empty free strings, quoted as `repr` quotes them and then escaped for JSON.

    Single quotes; double ones around a text with apostrophes; single ones again, with the
    apostrophes escaped, around a text with both. Each form comes once for every kind of letters,
    so that no text can take more than `max_tokens`, however a model may cut it.
    """
    double, apostrophe, backslash = r"\\\"", r"\\\\'", r"\\\\\\\\"  # as they are written
    kinds = (("ASCII", 1, _ASCII), ("NARROW", 2, _NARROW), ("WIDE", 4, f"{_LETTER}|{backslash}"))
    names = []
    for kind, width, letter in kinds:
        plain = f"{letter}| "
        n = _most_letters(max_tokens, width)
        quoted = plain if width == 1 else f"{plain}|{double}"
        yield f"SINGLE_{kind}: /'({quoted}){{1,{n}}}'/"
        n = _most_letters(max_tokens, 2 * width)
        yield f"DOUBLE_{kind}: /{double}({plain}){{0,{n}}}'({plain}|'){{0,{n}}}{double}/"
        names += [f"SINGLE_{kind}", f"DOUBLE_{kind}"]
    n = _most_letters(max_tokens, 3 * width)
    yield (
        f"BOTH: /'({plain}){{0,{n}}}"
        f"({double}({plain}|{double}){{0,{n}}}{apostrophe}"
        f"|{apostrophe}({plain}|{apostrophe}){{0,{n}}}{double})"
        f"({plain}|{double}|{apostrophe}){{0,{n}}}'/"
    )
    yield f"text: {' | '.join([*names, 'BOTH'])}"


def _most_letters(max_tokens: int, width: int) -> int:
    return min(_MAX_TEXT_LETTERS, max_tokens // width)


def number_pattern(minimum: float | None, maximum: float | None, *, is_integer: bool) -> str:
    """A regex for the numbers within bounds: whole, or else with up to two decimals.

    Without a bound, up to nine digits. Empty if there is no such number.
    """
    low, high = (
        (-1e9 + 1 if minimum is None else minimum),
        (1e9 - 1 if maximum is None else maximum),
    )
    ways = list(_magnitudes(max(low, 0), high, is_integer))
    smallest = max(-high, 1 if is_integer else 0.01)  # there is no -0
    negative = "|".join(_magnitudes(smallest, -low, is_integer))
    return "|".join([*ways, f"-({negative})"] if negative else ways)


def _magnitudes(low: float, high: float, is_integer: bool) -> Iterator[str]:
    """Regexes for the numbers from low >= 0 to high."""
    first, last = math.ceil(low), math.floor(high)
    if first <= last:
        yield _integers(first, last)
    if is_integer or low > high:
        return
    if first < last:
        yield rf"({_integers(first, last - 1)})\.[0-9]?[1-9]"
    for whole in sorted({math.floor(low), last}):
        if whole in range(first, last):
            continue
        hundredths = range(whole * 100 + 1, whole * 100 + 100)
        yield from (rf"{n / 100}".replace(".", r"\.") for n in hundredths if low <= n / 100 <= high)


def _integers(first: int, last: int) -> str:
    """A regex for the integers from first >= 0 to last, by their number of digits."""
    lengths = range(len(str(first)), len(str(last)) + 1)
    spans = ((max(first, 10 ** (n - 1) if n > 1 else 0), min(last, 10**n - 1)) for n in lengths)
    return "|".join(_digits(str(low), str(high)) for low, high in spans)


def _digits(low: str, high: str) -> str:
    """A regex for the numbers between two of the same length.

    >>> _digits("10", "35")
    '(3[0-5]|[1-2][0-9]{1})'
    """
    if low[:1] == high[:1]:
        return low[:1] + _digits(low[1:], high[1:]) if low else ""
    zeros, nines = "0" * (len(low) - 1), "9" * (len(low) - 1)
    start, end, ways = int(low[0]), int(high[0]), []
    if low[1:] != zeros:
        ways.append(low[0] + _digits(low[1:], nines))
        start += 1
    if high[1:] != nines:
        ways.append(high[0] + _digits(zeros, high[1:]))
        end -= 1
    if start <= end:
        ways.append(f"[{start}-{end}][0-9]{{{len(zeros)}}}")
    return f"({'|'.join(ways)})"


def _written(value: Value | dict[str, str]) -> str:
    """A value as it stands in a call's text."""
    return json.dumps(repr(value), ensure_ascii=False)[1:-1]


def _literal(text: str) -> str:
    """A string of Lark."""
    return json.dumps(text, ensure_ascii=False)
