"""Sentence templates: how people ask for a registry's functions, as something that can be said.

The templates are those of Home Assistant's intents, parsed by `hassil`; here each expression tree
becomes a function that says it at random, filling a draft's arguments as it goes. A function's
`sentences` is a list of groups:

    - weight: 2                        # against every other group of the file; 1 if not given
      arguments: {light_state: "on"}   # what every sentence of the group means
      incomplete: true                 # a required argument is left out; false if not given
      orders: ["turn [the] lights on in [the] {room}"]   # the file's carriers may stand around it
      phrases: ["it's too dark in here"]                 # said as it stands

`{room}` draws from the list `room` of the file and fills the argument of that name; `{room:area}`
fills `area`; repeated slots of an array add to it, never the same element twice. A list has
`values` (a text, or `in` with `out` and `weight`), or a `range: {from, to}`, whose numbers are said
in turn as digits or words, or `invented_names: {from, to}`: names of so many words, never heard
before, from which a model learns to copy what it is told. Where a value has no `out` and the
argument is a string without an enum, or an array of such, what was said is the value;
`wildcard: true` tells other readers of the file that anything may be said there. A slot that is no
argument is plain words. `expansion_rules` are phrases shared as `<name>`, a text or a list of
alternatives; `carriers` are ways to ask for an order, such as "could you {request}?". Which
sentences are drawn, and how they are typed, is synthesis.py's.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import Any

from hassil.errors import HassilError
from hassil.expression import (
    Alternative,
    Expression,
    Group,
    ListReference,
    Permutation,
    RuleReference,
    TextChunk,
)
from hassil.parse_expression import parse_sentence
from hassil.parser import ParseError
from unicode_rbnf import RbnfEngine

from fc_lightning.functions import FunctionSpec, ParameterSpec, Registry, RegistryError
from fc_lightning.tokenizer import get_encoding

_OPTIONAL_SHARE = 0.4  # how often an [optional] is said
_NUMBER_WORD_SHARE = 0.15  # how often a number is said in words
WORDS, NUMBER = "", "0"  # kinds of pieces; any other kind is a free argument's name


@dataclass
class Draft:
    """A sentence being said: its pieces, and the arguments that they fill.

    A piece is (text, kind): WORDS, NUMBER, or the name of the argument whose value the text is.
    """

    arguments: dict[str, Any]
    pieces: list[tuple[str, str]] = field(default_factory=list)


Say = Callable[[Draft, Random], None]


class NothingLeft(Exception):
    """Every value of a list is in the array already; the draft must be begun anew."""


@dataclass(frozen=True)
class Template:
    """One line of the file; carriers may stand around it if it is an order."""

    text: str
    say: Say
    is_order: bool


@dataclass(frozen=True)
class SentenceGroup:
    """Templates of one function that share fixed arguments and a weight."""

    spec: FunctionSpec
    arguments: Mapping[str, Any]
    is_incomplete: bool
    weight: float
    templates: tuple[Template, ...]

    def new_draft(self) -> Draft:
        """A draft that holds the group's fixed arguments, safe to change."""
        fixed = self.arguments.items()
        return Draft({name: list(v) if isinstance(v, list) else v for name, v in fixed})


@dataclass(frozen=True)
class Carrier:
    """What stands before and after an order."""

    before: Say
    after: Say
    weight: float


def compile_groups(registry: Registry) -> list[SentenceGroup]:
    """All groups of all functions, in file order.

    Raises:
        RegistryError: file, function, template and what to do.
    """
    groups = []
    for spec in registry.functions:
        if not isinstance(spec.sentences, list) or not spec.sentences:
            raise RegistryError(
                f"{registry.where}: function {spec.name!r} has no sentences; add a list of groups"
                " with orders or phrases beside its parameters"
            )
        compiler, seen = _Compiler(registry, spec), set[str]()
        groups += [_compile_group(compiler, entry, seen) for entry in spec.sentences]
    return groups


def compile_carriers(registry: Registry) -> list[Carrier]:
    """The file's ways to ask for an order; without any, an order stands alone."""
    compiler, carriers = _Compiler(registry, FunctionSpec("carriers", "", ())), []
    for entry in registry.source.get("carriers") or ["{request}"]:
        text, weight = _text_and_weight(entry, "says", f"{registry.where}: carriers")
        before, request, after = str(text).partition("{request}")
        if not request:
            raise RegistryError(f"{registry.where}: carrier {text!r} needs {{request}} in it")
        carriers.append(
            Carrier(compiler.compile_part(before), compiler.compile_part(after), weight)
        )
    return carriers


def _compile_group(compiler: _Compiler, entry: Any, seen: set[str]) -> SentenceGroup:
    spec, at = compiler.spec, f"{compiler.registry.where}: function {compiler.spec.name!r}"
    known = {"weight", "arguments", "incomplete", "orders", "phrases"}
    if not isinstance(entry, dict) or not entry.keys() <= known:
        raise RegistryError(f"{at}: a group of sentences has {', '.join(sorted(known))} only")
    kinds = {"arguments": dict, "orders": list, "phrases": list, "incomplete": bool}
    for key, kind in kinds.items():
        if not isinstance(entry.get(key) or kind(), kind):
            raise RegistryError(f"{at}: {key} of a group must be a {kind.__name__}")
    arguments = entry.get("arguments") or {}
    for name, value in arguments.items():
        parameter = spec.by_name.get(name)
        problem = parameter.violation(value) if parameter else f"it has no argument {name!r}"
        if problem:
            raise RegistryError(f"{at}: arguments of a group: {problem}")
    templates = tuple(
        Template(text, compiler.compile(text), is_order=kind == "orders")
        for kind in ("orders", "phrases")
        for text in entry.get(kind) or ()
    )
    if not templates:
        raise RegistryError(f"{at}: a group of sentences needs orders or phrases")
    for template in templates:
        if template.text in seen:
            raise RegistryError(f"{at}: template {template.text!r} stands there twice; drop one")
        seen.add(template.text)
    is_incomplete = bool(entry.get("incomplete"))
    return SentenceGroup(spec, arguments, is_incomplete, _weight(entry, at), templates)


def _text_and_weight(entry: Any, key: str, at: str) -> tuple[Any, float]:
    entry = entry if isinstance(entry, dict) else {key: entry}
    return entry.get(key), _weight(entry, at)


def _weight(entry: Mapping[str, Any], at: str) -> float:
    weight = entry.get("weight", 1)
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise RegistryError(f"{at}: weight {weight!r} must be a number above 0")
    return float(weight)


# ---------------------------------------------------------------- templates to sayings


@dataclass(frozen=True)
class _ListValue:
    say: Say
    out: Any  # None: what was said is the value
    weight: float


@lru_cache(maxsize=100_000)
def _parse(text: str) -> Expression:
    return parse_sentence(text).expression


class _Compiler:
    """Turns one function's templates into sayings, against the file's lists and rules."""

    def __init__(self, registry: Registry, spec: FunctionSpec) -> None:
        self.registry, self.spec = registry, spec
        self.rules: dict[str, Say | None] = {}  # None while the rule is being compiled
        self.lists: dict[tuple[str, str], Say] = {}
        self.template = ""

    def compile(self, text: Any) -> Say:
        """The saying of one template.

        Raises:
            RegistryError: file, function, template and what to do.
        """
        self.template = str(text)
        return self._compile_text(text)

    def compile_part(self, text: str) -> Say:
        """The saying of a part of a sentence, with the spaces at its ends, or of nothing."""
        if not text.strip():
            return _say_words(text)
        before, after = text[: -len(text.lstrip())], text[len(text.rstrip()) :]
        return _say_all([_say_words(before), self.compile(text), _say_words(after)])

    def _error(self, problem: str) -> RegistryError:
        at = f"{self.registry.where}: function {self.spec.name!r}"
        return RegistryError(f"{at}: template {self.template!r}: {problem}")

    def _compile_text(self, text: Any) -> Say:
        if not isinstance(text, str) or not text.strip():
            raise self._error(f"{text!r} is no text (put quotes around it)")
        try:
            return self._compile(_parse(text))
        except (ParseError, HassilError, AssertionError) as error:
            raise self._error(
                f"can't be parsed near {text!r} ({error}); check ( ) [ ] {{ }} < >"
            ) from None

    def _compile(self, expression: Expression) -> Say:
        if isinstance(expression, TextChunk):
            return _say_words(expression.original_text)
        if isinstance(expression, ListReference):
            return self._compile_list(expression.list_name, expression.slot_name)
        if isinstance(expression, RuleReference):
            return self._compile_rule(expression.rule_name)
        assert isinstance(expression, Group), expression
        sayings = [self._compile(item) for item in expression.items]
        if isinstance(expression, Alternative):
            return _say_one(sayings, is_optional=expression.is_optional)
        return _say_all(sayings, is_shuffled=isinstance(expression, Permutation))

    def _compile_rule(self, name: str) -> Say:
        if name not in self.rules:
            rules = self.registry.source.get("expansion_rules") or {}
            if name not in rules:
                raise self._error(f"there is no rule <{name}>; add it to expansion_rules")
            self.rules[name] = None
            texts = rules[name] if isinstance(rules[name], list) else [rules[name]]
            self.rules[name] = _say_one([self._compile_text(text) for text in texts])
        say = self.rules[name]
        if say is None:
            raise self._error(f"rule <{name}> contains itself; break the circle")
        return say

    def _compile_list(self, name: str, argument: str) -> Say:
        if (name, argument) not in self.lists:
            self.lists[name, argument] = self._say_list(name, argument)
        return self.lists[name, argument]

    def _say_list(self, name: str, argument: str) -> Say:
        parameter = self.spec.by_name.get(argument)
        if parameter is None and argument != name:
            known = ", ".join(self.spec.by_name) or "none"
            raise self._error(f"{argument!r} is no argument of the function (it has {known})")
        entry = (self.registry.source.get("lists") or {}).get(name)
        kinds = ("values", "range", "invented_names")
        if not isinstance(entry, dict) or not any(entry.get(kind) for kind in kinds):
            raise self._error(f"there is no list {{{name}}}; add it to lists, with values or range")
        if "range" in entry:
            return self._say_range(name, entry["range"], parameter)
        if "invented_names" in entry:
            say_name = _say_invented_name(self._numbers(name, entry["invented_names"]))
            if parameter is None:
                return say_name
            if not _is_free(parameter):
                raise self._error(f"list {{{name}}}: {argument} takes no invented names")
            values = [_ListValue(say_name, None, 1)]
        elif not isinstance(entry["values"], list):
            raise self._error(f"list {{{name}}}: values must be a list, not {entry['values']!r}")
        else:
            values = [self._list_value(name, value, parameter) for value in entry["values"]]
        if parameter is not None and parameter.type == "array":
            return _say_element(values, argument)
        return _say_value(values, argument if parameter else "")

    def _list_value(self, name: str, value: Any, parameter: ParameterSpec | None) -> _ListValue:
        text, weight = _text_and_weight(value, "in", f"{self.registry.where}: list {{{name}}}")
        say = self._compile_text(text)
        out = value.get("out") if isinstance(value, dict) else None
        if parameter is None or (out is None and _is_free(parameter)):
            return _ListValue(say, None, weight)
        out = text if out is None else out
        items = out if isinstance(out, list) else [out]
        problems = map(parameter.item_violation, items)
        if problem := next(filter(None, problems), None):
            raise self._error(f"list {{{name}}}: {problem}; give the value as 'out'")
        return _ListValue(say, items if parameter.type == "array" else out, weight)

    def _say_range(self, name: str, bounds: Any, parameter: ParameterSpec | None) -> Say:
        numbers = self._numbers(name, bounds)
        language = self.registry.source.get("language", "en")
        try:
            words = _number_words(numbers, str(language))
        except ValueError:
            raise self._error(f"language {language!r} is unknown; use one such as en") from None
        ends = (numbers[0], numbers[-1])
        problems = (parameter.violation(end) for end in ends if parameter)
        if problem := next(filter(None, problems), None):
            raise self._error(f"list {{{name}}}: {problem}; change the range")
        return _say_number(words, parameter.name if parameter else "")

    def _numbers(self, name: str, bounds: Any) -> range:
        try:
            numbers = range(bounds["from"], bounds["to"] + 1, bounds.get("step", 1))
            _ = numbers[0]
        except (TypeError, KeyError, IndexError, ValueError):
            raise self._error(f"list {{{name}}}: needs whole numbers 'from' and 'to'") from None
        return numbers


def _is_free(parameter: ParameterSpec) -> bool:
    """Whether any text may be its value, or an element of it."""
    return not parameter.enum and "string" in (parameter.type, parameter.item_type)


@lru_cache(maxsize=64)
def _number_words(numbers: range, language: str) -> dict[int, str]:
    engine = RbnfEngine.for_language(language)
    return {number: engine.format_number(number).text for number in numbers}


def _say_words(text: str) -> Say:
    piece = (text, WORDS)

    def say(draft: Draft, rng: Random) -> None:
        draft.pieces.append(piece)

    return say


def _say_all(sayings: list[Say], *, is_shuffled: bool = False) -> Say:
    def say(draft: Draft, rng: Random) -> None:
        for saying in rng.sample(sayings, len(sayings)) if is_shuffled else sayings:
            saying(draft, rng)

    return sayings[0] if len(sayings) == 1 else say


def _say_one(sayings: list[Say], *, is_optional: bool = False) -> Say:
    """Each alternative alike, however much it holds; an optional's last one is saying nothing."""
    choices = sayings[:-1] if is_optional else sayings
    num_choices = len(choices)

    def say(draft: Draft, rng: Random) -> None:
        if is_optional and rng.random() >= _OPTIONAL_SHARE:
            return
        choices[int(rng.random() * num_choices)](draft, rng)

    return say if is_optional or num_choices > 1 else choices[0]


def _say_number(words: Mapping[int, str], argument: str) -> Say:
    deck: list[int] = []  # dealt to its end before it is shuffled again, so that no number is rare

    def say(draft: Draft, rng: Random) -> None:
        if not deck:
            deck.extend(rng.sample(list(words), len(words)))
        number = deck.pop()
        text = words[number] if rng.random() < _NUMBER_WORD_SHARE else str(number)
        draft.pieces.append((text, NUMBER))
        if argument:
            draft.arguments[argument] = number

    return say


def _say_value(values: list[_ListValue], argument: str) -> Say:
    weights = list(accumulate(value.weight for value in values))

    def say(draft: Draft, rng: Random) -> None:
        start = len(draft.pieces)
        value = values[bisect(weights, rng.random() * weights[-1])]
        value.say(draft, rng)
        if argument and value.out is None:
            _merge(draft, start, argument)
        elif argument:
            draft.arguments[argument] = value.out

    return say


def _merge(draft: Draft, start: int, kind: str) -> str:
    """Make one piece of those from `start` on; its text."""
    text = "".join(piece for piece, _ in draft.pieces[start:])
    draft.pieces[start:] = [(text, kind)]
    return text


@lru_cache
def _name_parts() -> tuple[list[str], list[str]]:
    """Beginnings and endings of words, from the vocabulary: " Harb" and "ington"."""
    encoding = get_encoding()
    pieces = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab - 3)]
    words = [piece.decode("ascii", "replace") for piece in pieces]
    beginnings = [w.strip() for w in words if re.fullmatch(r" [A-Z][a-z]{2,8}", w)]
    return beginnings, [w for w in words if re.fullmatch(r"[a-z]{2,5}", w)]


def _say_invented_name(num_words: range) -> Say:
    beginnings, endings = _name_parts()

    def say(draft: Draft, rng: Random) -> None:
        words = [
            rng.choice(beginnings) + (rng.choice(endings) if rng.random() < 0.3 else "")
            for _ in range(rng.choice(num_words))
        ]
        draft.pieces.append((" ".join(words), WORDS))

    return say


def _say_element(values: list[_ListValue], argument: str) -> Say:
    def say(draft: Draft, rng: Random) -> None:
        filled, start = draft.arguments.setdefault(argument, []), len(draft.pieces)
        left = [value for value in values if not any(item in filled for item in value.out or ())]
        while left:
            value = rng.choices(left, [value.weight for value in left])[0]
            value.say(draft, rng)
            items = value.out
            if items is None:  # lower case as other free text, and no typo in it as in a number
                items = [" ".join(_merge(draft, start, NUMBER).lower().split())]
            if not any(item in filled for item in items):
                filled.extend(items)
                return
            left.remove(value)
            del draft.pieces[start:]
        raise NothingLeft

    return say
