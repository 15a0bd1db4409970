"""Examples made from a registry's sentence templates: what people would say, and the call meant.

The templates are those of Home Assistant's intents, parsed by `hassil`; here its expression trees
are sampled at random. A function's `sentences` is a list of groups:

    - weight: 2                        # against every other group of the file; 1 if not given
      arguments: {light_state: "on"}   # what every sentence of the group means
      incomplete: true                 # a required argument is left out; false if not given
      orders: ["turn [the] lights on in [the] {room}"]   # the carriers may stand around these
      phrases: ["it's too dark in here"]                 # these are said as they stand

`{room}` draws from the list `room` of the file and fills the argument of that name; `{room:area}`
fills `area`; repeated slots of an array add to it. A list is `values` (a text, or `in` with `out`
and `weight`) or `range: {from, to}`; in a list with `wildcard: true` anything may be said, its
values only show what, and what was said becomes the argument. A slot whose list bears no
argument's name is plain words. The file's `expansion_rules` are phrases shared as `<name>`, a text
or a list of alternatives; `carriers` are the ways to ask for an order, such as
"could you {request}?". How a call is written and compared is not decided here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
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

from fc_lightning.chat import Example, make_example
from fc_lightning.functions import (
    INCOMPLETE_PREFIX,
    FunctionCall,
    FunctionSpec,
    ParameterSpec,
    Registry,
    RegistryError,
)

TEST_SHARE = 0.1
_OPTIONAL_SHARE = 0.4  # how often an [optional] is said
_NUMBER_WORD_SHARE = 0.15  # how often a number is said as words
_ATTEMPTS = 40  # draws of a group without a new command before it counts as exhausted


@dataclass(frozen=True)
class SyntheticData:
    """Examples for training and for test; no command and no template is in both."""

    train: list[Example]
    test: list[Example]


def synthesize(
    registry: Registry,
    *,
    num_examples: int = 25_000,
    seed: int = 0,
    incomplete_share: float = 0.125,
) -> SyntheticData:
    """Draw `num_examples` different commands, a tenth of them test; the same for the same seed.

    No two examples have the same command (letters and digits compared, case folded), each call
    satisfies its schema, and its arguments are in canonical order.

    Raises:
        RegistryError: a template that can't be used, or sentences that are missing.
        ValueError: the templates do not have so many commands in them.
    """
    if num_examples < 1 or not 0 <= incomplete_share <= 1:
        raise ValueError(
            f"num_examples {num_examples} must be at least 1 and incomplete_share"
            f" {incomplete_share} between 0 and 1"
        )
    rng = Random(seed)
    train_groups, test_groups = _hold_out_templates(_compile_groups(registry), rng, registry.where)
    num_test = round(num_examples * TEST_SHARE)
    drawer = _Drawer(registry, rng)
    test = drawer.draw(test_groups, num_test, incomplete_share)
    train = drawer.draw(train_groups, num_examples - num_test, incomplete_share)
    return SyntheticData(train, test)


def write_data_folder(
    output: Path,
    registry: Registry,
    *,
    num_examples: int = 25_000,
    seed: int = 0,
    incomplete_share: float = 0.125,
) -> None:
    """Write fc_train.json and fc_test.json into `output`; on any failure it is left as it was."""
    examples = synthesize(
        registry, num_examples=num_examples, seed=seed, incomplete_share=incomplete_share
    )
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output))
    try:
        for name, rows in (("fc_train.json", examples.train), ("fc_test.json", examples.test)):
            text = json.dumps([asdict(row) for row in rows], ensure_ascii=False, indent=1)
            (unfinished / name).write_text(text + "\n", encoding="utf-8")
        for path in sorted(unfinished.iterdir()):
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(unfinished)


NOT_SAID = "(not said)"
ANY_TEXT = "(any text)"


def coverage(registry: Registry, calls: Iterable[FunctionCall]) -> dict[tuple[str, str, str], int]:
    """How often each (function, argument, value) occurs; what could occur but doesn't counts 0.

    Integers within bounds are values of their own. An array counts its elements, and the number of
    elements as "2 of 4". Optional arguments also count NOT_SAID; free text is ANY_TEXT; an
    incomplete call counts under its own name, with '' for what is missing.
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
    labels = [str(choice) for choice in parameter.enum]
    if parameter.type == "boolean":
        labels = ["False", "True"]
    elif not labels and parameter.minimum is not None and parameter.maximum is not None:
        labels = [str(n) for n in range(int(parameter.minimum), int(parameter.maximum) + 1)]
    elif not labels:
        labels = [ANY_TEXT]
    if parameter.type == "array" and parameter.enum:
        labels += [f"{n} of {len(parameter.enum)}" for n in range(1, len(parameter.enum) + 1)]
    return labels if parameter.is_required else [*labels, NOT_SAID]


def _labels(parameter: ParameterSpec, value: Any) -> list[str]:
    if value is None:
        return [NOT_SAID]
    if value == "":
        return ["''"]
    if isinstance(value, list):
        return [*map(str, value), f"{len(value)} of {len(parameter.enum)}"]
    is_free = parameter.type == "string" and not parameter.enum
    return [ANY_TEXT if is_free else str(value)]


# ---------------------------------------------------------------- templates to sayings


@dataclass
class _Draft:
    """A sentence being said: its pieces, and the arguments that they fill.

    A piece is (text, kind): "" for words, "kept" for what typing errors leave alone, or the name
    of the argument whose value the text is.
    """

    pieces: list[tuple[str, str]] = field(default_factory=list)
    arguments: dict[str, Any] = field(default_factory=dict)


Say = Callable[[_Draft, Random], None]


class _NothingLeft(Exception):
    """Every value of a list is already in the array; the draft must be drawn anew."""


@dataclass(frozen=True)
class _Template:
    text: str
    say: Say
    is_order: bool


@dataclass(frozen=True)
class _Group:
    """Templates of one function that share fixed arguments and a weight."""

    spec: FunctionSpec
    arguments: Mapping[str, Any]
    is_incomplete: bool
    weight: float
    templates: tuple[_Template, ...]


@dataclass(frozen=True)
class _ListValue:
    say: Say
    out: Any  # None: what was said is the value
    weight: float


@lru_cache(maxsize=100_000)
def _parse(text: str) -> Expression:
    return parse_sentence(text).expression


class _Compiler:
    """Turns one function's templates into functions that say them, against the file's lists."""

    def __init__(self, registry: Registry, spec: FunctionSpec, rules: dict[str, Say]) -> None:
        self.source, self.spec, self.where = registry.source, spec, registry.where
        self.rules = rules
        self.lists: dict[tuple[str, str], Say] = {}
        self.template = ""

    def compile(self, text: Any) -> Say:
        """The saying of one template.

        Raises:
            RegistryError: file, function, template and what to do.
        """
        self.template = str(text)
        return self._compile_text(text)

    def error(self, problem: str) -> RegistryError:
        at = f"{self.where}: function {self.spec.name!r}"
        return RegistryError(f"{at}: template {self.template!r}: {problem}")

    def _compile_text(self, text: Any) -> Say:
        if not isinstance(text, str) or not text.strip():
            raise self.error(f"{text!r} is no text (put quotes around it)")
        try:
            return self._compile(_parse(text))
        except (ParseError, HassilError, AssertionError) as error:
            raise self.error(
                f"can't be parsed near {text!r} ({error}); check ( ) [ ] {{ }} < >"
            ) from None

    def _compile(self, expression: Expression) -> Say:
        if isinstance(expression, TextChunk):
            return _say_words(expression.original_text)
        if isinstance(expression, ListReference):
            return self._compile_list(expression)
        if isinstance(expression, RuleReference):
            return self._compile_rule(expression.rule_name)
        assert isinstance(expression, Group), expression
        sayings = [self._compile(item) for item in expression.items]
        if isinstance(expression, Alternative):
            return _say_one(sayings, is_optional=expression.is_optional)
        return _say_all(sayings, is_shuffled=isinstance(expression, Permutation))

    def _compile_rule(self, name: str) -> Say:
        if name not in self.rules:
            rules = self.source.get("expansion_rules") or {}
            if name not in rules:
                raise self.error(f"there is no rule <{name}>; add it to expansion_rules")
            # A rule that contains itself finds this entry instead of recurring for ever.
            self.rules[name] = self._say_endless_rule(name)
            texts = rules[name] if isinstance(rules[name], list) else [rules[name]]
            self.rules[name] = _say_one([self._compile_text(text) for text in texts])
        return self.rules[name]

    def _say_endless_rule(self, name: str) -> Say:
        def say(draft: _Draft, rng: Random) -> None:
            raise self.error(f"rule <{name}> contains itself; break the circle")

        return say

    def _compile_list(self, reference: ListReference) -> Say:
        key = reference.list_name, reference.slot_name
        if key not in self.lists:
            self.lists[key] = self._say_list(*key)
        return self.lists[key]

    def _say_list(self, name: str, argument: str) -> Say:
        parameter = self.spec.by_name.get(argument)
        if parameter is None and argument != name:
            known = ", ".join(self.spec.by_name) or "none"
            raise self.error(f"{argument!r} is no argument of the function (it has {known})")
        entry = (self.source.get("lists") or {}).get(name)
        if not isinstance(entry, dict) or not ("range" in entry or "values" in entry):
            raise self.error(
                f"there is no list {{{name}}}; add it to lists, with values or a range"
            )
        if "range" in entry:
            return self._say_number(name, entry["range"], parameter)
        values = [self._list_value(name, value, parameter) for value in entry["values"]]
        if parameter is None:
            return _say_value(values, "", is_array=False)
        return _say_value(values, argument, is_array=parameter.type == "array")

    def _list_value(self, name: str, value: Any, parameter: ParameterSpec | None) -> _ListValue:
        entry = value if isinstance(value, dict) else {"in": value}
        out = entry.get("out")
        if out is None and parameter is not None and (parameter.enum or parameter.type != "string"):
            out = entry.get("in")
        items = out if isinstance(out, list) else [out]
        if parameter is not None and out is not None:
            if problem := next(filter(None, map(parameter.item_violation, items)), None):
                raise self.error(f"list {{{name}}}: {problem}; give the value as 'out'")
            out = items if parameter.type == "array" else out
        return _ListValue(self._compile_text(entry.get("in")), out, float(entry.get("weight", 1)))

    def _say_number(self, name: str, bounds: Any, parameter: ParameterSpec | None) -> Say:
        try:
            numbers = range(bounds["from"], bounds["to"] + 1, bounds.get("step", 1))
        except (TypeError, KeyError):
            raise self.error(
                f"list {{{name}}}: range needs whole numbers 'from' and 'to'"
            ) from None
        for number in (numbers[0], numbers[-1]) if parameter and numbers else ():
            if problem := parameter.violation(number):
                raise self.error(f"list {{{name}}}: {problem}; change the range")
        words = _number_words(numbers, str(self.source.get("language", "en")))
        argument = parameter.name if parameter else None

        def say(draft: _Draft, rng: Random) -> None:
            number = rng.choice(numbers)
            text = words[number] if rng.random() < _NUMBER_WORD_SHARE else str(number)
            draft.pieces.append((text, "kept"))
            if argument:
                draft.arguments[argument] = number

        return say


@lru_cache(maxsize=64)
def _number_words(numbers: range, language: str) -> dict[int, str]:
    engine = RbnfEngine.for_language(language)
    return {number: engine.format_number(number).text for number in numbers}


def _say_words(text: str) -> Say:
    piece = (text, "")

    def say(draft: _Draft, rng: Random) -> None:
        draft.pieces.append(piece)

    return say


def _say_all(sayings: list[Say], *, is_shuffled: bool = False) -> Say:
    def say(draft: _Draft, rng: Random) -> None:
        for saying in rng.sample(sayings, len(sayings)) if is_shuffled else sayings:
            saying(draft, rng)

    return sayings[0] if len(sayings) == 1 else say


def _say_one(sayings: list[Say], *, is_optional: bool = False) -> Say:
    """Each alternative alike, however much it holds; an optional's last one is saying nothing."""
    choices = sayings[:-1] if is_optional else sayings
    num_choices = len(choices)

    def say(draft: _Draft, rng: Random) -> None:
        if is_optional and rng.random() >= _OPTIONAL_SHARE:
            return
        choices[int(rng.random() * num_choices)](draft, rng)

    return say if is_optional or num_choices > 1 else choices[0]


def _say_value(values: list[_ListValue], argument: str, *, is_array: bool) -> Say:
    weights = list(accumulate(value.weight for value in values))

    def say(draft: _Draft, rng: Random) -> None:
        value = values[bisect(weights, rng.random() * weights[-1])]
        value.say(draft, rng)
        if argument:
            draft.arguments[argument] = value.out

    def say_free_text(draft: _Draft, rng: Random) -> None:
        value = values[bisect(weights, rng.random() * weights[-1])]
        start = len(draft.pieces)
        value.say(draft, rng)
        text = _one_line("".join(piece for piece, _ in draft.pieces[start:]))
        draft.pieces[start:] = [(text, argument)]

    def say_element(draft: _Draft, rng: Random) -> None:
        filled = draft.arguments.setdefault(argument, [])
        left = [value for value in values if not any(item in filled for item in value.out)]
        if not left:
            raise _NothingLeft
        value = rng.choices(left, [value.weight for value in left])[0]
        value.say(draft, rng)
        filled.extend(value.out)

    if is_array:
        return say_element
    return say_free_text if argument and all(value.out is None for value in values) else say


def _compile_groups(registry: Registry) -> list[_Group]:
    groups = []
    for spec in registry.functions:
        if not isinstance(spec.sentences, list) or not spec.sentences:
            raise RegistryError(
                f"{registry.where}: function {spec.name!r} has no sentences; add a list of groups"
                " with orders or phrases beside its parameters"
            )
        compiler = _Compiler(registry, spec, {})
        groups += [_compile_group(compiler, entry) for entry in spec.sentences]
    return groups


def _compile_group(compiler: _Compiler, entry: Any) -> _Group:
    spec, at = compiler.spec, f"{compiler.where}: function {compiler.spec.name!r}"
    known = {"weight", "arguments", "incomplete", "orders", "phrases"}
    if not isinstance(entry, dict) or not entry.keys() <= known:
        raise RegistryError(f"{at}: a group of sentences has only {', '.join(sorted(known))}")
    arguments = entry.get("arguments") or {}
    for name, value in arguments.items():
        parameter = spec.by_name.get(name)
        problem = parameter.violation(value) if parameter else f"it has no argument {name!r}"
        if problem:
            raise RegistryError(f"{at}: arguments of a group: {problem}")
    templates = tuple(
        _Template(text, compiler.compile(text), is_order=kind == "orders")
        for kind in ("orders", "phrases")
        for text in entry.get(kind) or ()
    )
    if not templates:
        raise RegistryError(f"{at}: a group of sentences needs orders or phrases")
    weight, is_incomplete = float(entry.get("weight", 1)), bool(entry.get("incomplete", False))
    return _Group(spec, arguments, is_incomplete, weight, templates)


def _hold_out_templates(
    groups: list[_Group], rng: Random, where: str
) -> tuple[list[_Group], list[_Group]]:
    """Split each group's templates for train and test; a group of fewer than four only trains."""
    train, test = [], []
    for group in groups:
        num_templates = len(group.templates)
        num_held_out = max(1, round(num_templates * TEST_SHARE)) if num_templates >= 4 else 0
        held_out = set(rng.sample(range(num_templates), num_held_out))
        for side, is_test in ((train, False), (test, True)):
            chosen = tuple(t for i, t in enumerate(group.templates) if (i in held_out) == is_test)
            if chosen:
                side.append(_with_templates(group, chosen))
    if not test:
        raise RegistryError(
            f"{where}: no group of sentences has four templates, so none can be kept for test;"
            " write more"
        )
    return train, test


def _with_templates(group: _Group, templates: tuple[_Template, ...]) -> _Group:
    return _Group(group.spec, group.arguments, group.is_incomplete, group.weight, templates)


# ---------------------------------------------------------------- drawing


class _Drawer:
    """Draws commands that were not drawn before."""

    def __init__(self, registry: Registry, rng: Random) -> None:
        self.registry, self.rng = registry, rng
        self.drawn: set[str] = set()
        self.is_valid: dict[str, bool] = {}
        carriers = _compile_carriers(registry)
        self.carriers = [(before, after) for before, after, _ in carriers]
        self.carrier_weights = list(accumulate(weight for *_, weight in carriers))

    def draw(
        self, groups: list[_Group], num_examples: int, incomplete_share: float
    ) -> list[Example]:
        num_incomplete = round(num_examples * incomplete_share)
        if not any(group.is_incomplete for group in groups):
            num_incomplete = 0
        rows = self._draw_kind([g for g in groups if g.is_incomplete], num_incomplete)
        rows += self._draw_kind(
            [g for g in groups if not g.is_incomplete], num_examples - num_incomplete
        )
        self.rng.shuffle(rows)
        return rows

    def _draw_kind(self, groups: list[_Group], num_examples: int) -> list[Example]:
        rows: list[Example] = []
        groups, weights = list(groups), [group.weight for group in groups]
        while len(rows) < num_examples:
            if not groups:
                raise ValueError(
                    f"{self.registry.where}: the sentences hold only about {len(rows):,} different"
                    f" commands, not {num_examples:,}; ask for fewer examples or write more"
                )
            i = self.rng.choices(range(len(groups)), weights)[0]
            row = self._new_example(groups[i])
            if row is None:
                del groups[i], weights[i]
            else:
                rows.append(row)
        return rows

    def _new_example(self, group: _Group) -> Example | None:
        """An example whose command is new, or None where the group seems exhausted."""
        for _ in range(_ATTEMPTS):
            template = group.templates[int(self.rng.random() * len(group.templates))]
            draft = _Draft(arguments=dict(group.arguments))
            try:
                self._say(template, draft)
            except _NothingLeft:
                continue
            command = _as_typed(draft, group.spec, self.rng)
            letters = _letters(command)
            if letters and letters not in self.drawn:
                call = self._call(group, template, draft.arguments)
                self.drawn.add(letters)
                return make_example(command, call)
        return None

    def _say(self, template: _Template, draft: _Draft) -> None:
        if not template.is_order:
            return template.say(draft, self.rng)
        chance = self.rng.random() * self.carrier_weights[-1]
        before, after = self.carriers[bisect(self.carrier_weights, chance)]
        before(draft, self.rng)
        template.say(draft, self.rng)
        return after(draft, self.rng)

    def _call(self, group: _Group, template: _Template, arguments: dict[str, Any]) -> FunctionCall:
        name = group.spec.name
        if group.is_incomplete:
            name = INCOMPLETE_PREFIX + name
            arguments = {n: "" for n in group.spec.required} | arguments
        call = self.registry.canonical(FunctionCall(name, arguments))
        key = repr((call.name, call.arguments))
        if key not in self.is_valid:
            if problems := self.registry.violations(call):
                raise RegistryError(
                    f"{self.registry.where}: function {group.spec.name!r}: template"
                    f" {template.text!r}: {problems[0]}; fill it with a slot or the group's"
                    " arguments, or mark the group incomplete"
                )
            self.is_valid[key] = True
        return call


def _compile_carriers(registry: Registry) -> list[tuple[Say, Say, float]]:
    spec = FunctionSpec("carriers", "", ())
    compiler, carriers = _Compiler(registry, spec, {}), []
    for carrier in registry.source.get("carriers") or ["{request}"]:
        entry = carrier if isinstance(carrier, dict) else {"says": carrier}
        text = str(entry.get("says"))
        before, request, after = text.partition("{request}")
        if not request:
            raise RegistryError(f"{registry.where}: carrier {text!r} needs {{request}} in it")
        says = [
            compiler.compile(part) if part.strip() else _say_words("") for part in (before, after)
        ]
        carriers.append((_spaced(says[0], before), says[1], float(entry.get("weight", 1))))
    return carriers


def _spaced(say: Say, text: str) -> Say:
    return _say_all([say, _say_words(" ")]) if text.endswith(" ") else say


# ---------------------------------------------------------------- from words to what is typed

_SPOKEN_SHARE = 0.06  # as a speech recogniser writes: no capitals, no punctuation
_CASUAL_SHARE = 0.06  # typed in lower case, without the full stop
_TYPO_SHARE = 0.02
_CURLY_SHARE = 0.06
_NO_STOP_SHARE = 0.2
_PUNCTUATION = re.compile(r"""[.,?!;:()"“”]|(?<!\w)'|'(?!\w)""")


def _as_typed(draft: _Draft, spec: FunctionSpec, rng: Random) -> str:
    """Put the draft's pieces on paper, in one of several hands, and fill in its free arguments.

    A free argument's value is what stands on paper: lower case, with a straight apostrophe.
    """
    pieces, hand = draft.pieces, rng.random()
    if hand < _SPOKEN_SHARE:
        pieces = [(_PUNCTUATION.sub("", t.replace("&", "and").lower()), kind) for t, kind in pieces]
    elif hand < _SPOKEN_SHARE + _CASUAL_SHARE:
        pieces = [(text.lower(), kind) for text, kind in pieces]
    for text, kind in pieces:
        if kind and kind != "kept":
            draft.arguments[kind] = _one_line(text).lower().rstrip(".?!, ")
    if rng.random() < _TYPO_SHARE:
        pieces = _with_typo(pieces, rng)
    command = _one_line("".join(text for text, _ in pieces))
    if hand >= _SPOKEN_SHARE + _CASUAL_SHARE:
        command = command[:1].upper() + command[1:]
        if command[-1:] not in "?!." and rng.random() >= _NO_STOP_SHARE:
            command += "."
    return command.replace("'", "’") if rng.random() < _CURLY_SHARE else command


def _with_typo(pieces: list[tuple[str, str]], rng: Random) -> list[tuple[str, str]]:
    """Swap, lose or double one letter inside one longer word; numbers and free text are safe."""
    places = [
        (i, match.start() + 1, match.end() - 1)
        for i, (text, kind) in enumerate(pieces)
        if not kind
        for match in re.finditer(r"[a-z]{5,}", text)
    ]
    if not places:
        return pieces
    i, start, end = rng.choice(places)
    text, at = pieces[i][0], rng.randrange(start, end - 1)
    slip = rng.choice((text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]))
    return [*pieces[:i], (text[:at] + slip + text[at + 2 :], ""), *pieces[i + 1 :]]


def _one_line(text: str) -> str:
    return re.sub(r" +(?=[,.?!])", "", " ".join(text.split()))


def _letters(command: str) -> str:
    """What makes two commands the same: letters and digits, case folded."""
    return "".join(c for c in command.casefold() if c.isalnum())
