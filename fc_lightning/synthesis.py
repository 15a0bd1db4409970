"""Training examples from a registry's sentence templates: a command, and the call it means.

Here groups and templates are chosen, templates are kept apart for test, sentences are put on paper
the way people type or a recognizer writes, and duplicates are left out. What a template says,
and how a call is written, is decided elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from bisect import bisect
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from fc_lightning.calls import INCOMPLETE_PREFIX, FunctionCall
from fc_lightning.chat import Example, make_example
from fc_lightning.functions import Registry, RegistryError
from fc_lightning.sentences import (
    NUMBER,
    WORDS,
    Draft,
    NothingLeft,
    SentenceGroup,
    Template,
    compile_carriers,
    compile_groups,
)

TEST_SHARE = 0.1
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

    No two examples have the same command by `command_key`, each call satisfies its schema, and its
    arguments are in canonical order.

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
    train_groups, test_groups = _hold_out_templates(compile_groups(registry), rng, registry.where)
    num_test = round(num_examples * TEST_SHARE)
    drawer = _Drawer(registry, rng)
    # Few templates are held out: those of a small domain may not have so many commands in them.
    test = drawer.draw(test_groups, num_test, incomplete_share, may_be_fewer=True)
    train = drawer.draw(train_groups, num_examples - num_test, incomplete_share)
    return SyntheticData(train, test)


def write_data_folder(
    output: Path,
    registry: Registry,
    *,
    num_examples: int = 25_000,
    seed: int = 0,
    incomplete_share: float = 0.125,
) -> SyntheticData:
    """Write fc_train.json and fc_test.json into `output`, and return what they hold.

    On any failure the folder is left as it was.
    """
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
    return examples


# ---------------------------------------------------------------- drawing


def _hold_out_templates(
    groups: list[SentenceGroup], rng: Random, where: str
) -> tuple[list[SentenceGroup], list[SentenceGroup]]:
    """Split each group's templates for train and test; a group of fewer than four only trains."""
    train: list[SentenceGroup] = []
    test: list[SentenceGroup] = []
    for group in groups:
        num_templates = len(group.templates)
        num_held_out = max(1, round(num_templates * TEST_SHARE)) if num_templates >= 4 else 0
        held_out = set(rng.sample(range(num_templates), num_held_out))
        for side, is_test in ((train, False), (test, True)):
            chosen = tuple(t for i, t in enumerate(group.templates) if (i in held_out) == is_test)
            if chosen:
                side.append(replace(group, templates=chosen))
    if not test:
        raise RegistryError(
            f"{where}: no group of sentences has four templates, so none can be kept for test;"
            " write more"
        )
    return train, test


class _Drawer:
    """Draws commands that were not drawn before."""

    def __init__(self, registry: Registry, rng: Random) -> None:
        self.registry, self.rng = registry, rng
        self.drawn: set[str] = set()
        self.valid_calls: set[str] = set()
        self.carriers = compile_carriers(registry)
        self.carrier_weights = list(accumulate(carrier.weight for carrier in self.carriers))

    def draw(
        self,
        groups: list[SentenceGroup],
        num_examples: int,
        incomplete_share: float,
        *,
        may_be_fewer: bool = False,
    ) -> list[Example]:
        num_incomplete = round(num_examples * incomplete_share)
        if not any(group.is_incomplete for group in groups):
            num_incomplete = 0
        rows: list[Example] = []
        for is_incomplete, num_rows in (
            (True, num_incomplete),
            (False, num_examples - num_incomplete),
        ):
            some = [group for group in groups if group.is_incomplete == is_incomplete]
            drawn = self._draw_kind(some, num_rows)
            if len(drawn) < num_rows and not may_be_fewer:
                raise ValueError(
                    f"{self.registry.where}: the sentences hold only about {len(drawn):,} different"
                    f" commands, not {num_rows:,}; ask for fewer examples or write more"
                )
            rows += drawn
        self.rng.shuffle(rows)
        return rows

    def _draw_kind(self, groups: list[SentenceGroup], num_examples: int) -> list[Example]:
        """So many examples, or all that there seem to be."""
        rows: list[Example] = []
        groups, weights = list(groups), [group.weight for group in groups]
        while groups and len(rows) < num_examples:
            i = self.rng.choices(range(len(groups)), weights)[0]
            row = self._new_example(groups[i])
            if row is None:
                del groups[i], weights[i]
            else:
                rows.append(row)
        return rows

    def _new_example(self, group: SentenceGroup) -> Example | None:
        """An example whose command is new, or None where the group seems exhausted."""
        for _ in range(_ATTEMPTS):
            template = group.templates[int(self.rng.random() * len(group.templates))]
            draft = group.new_draft()
            try:
                self._say(template, draft)
            except NothingLeft:
                continue
            command = _as_typed(draft, self.rng)
            key = command_key(command)
            if key and key not in self.drawn:
                call = self._call(group, template, draft.arguments)
                self.drawn.add(key)
                return make_example(command, call)
        return None

    def _say(self, template: Template, draft: Draft) -> None:
        if not template.is_order:
            return template.say(draft, self.rng)
        chance = self.rng.random() * self.carrier_weights[-1]
        carrier = self.carriers[bisect(self.carrier_weights, chance)]
        carrier.before(draft, self.rng)
        template.say(draft, self.rng)
        return carrier.after(draft, self.rng)

    def _call(
        self, group: SentenceGroup, template: Template, arguments: dict[str, Any]
    ) -> FunctionCall:
        name = group.spec.name
        if group.is_incomplete:
            name = INCOMPLETE_PREFIX + name
            arguments = {n: "" for n in group.spec.required} | arguments
        call = self.registry.canonical(FunctionCall(name, arguments))
        key = repr((call.name, call.arguments))
        if key not in self.valid_calls:
            if problems := self.registry.violations(call):
                fix = "fill it with a slot or the group's arguments, or mark the group incomplete"
                if group.is_incomplete:
                    fix = "leave out what is 'required', or take 'incomplete' from the group"
                raise RegistryError(
                    f"{self.registry.where}: function {group.spec.name!r}: template"
                    f" {template.text!r}: {problems[0]}; {fix}"
                )
            self.valid_calls.add(key)
        return call


# ---------------------------------------------------------------- from words to what is typed

_SPOKEN_SHARE = 0.06  # as a speech recogniser writes: no capitals, no punctuation
_CASUAL_SHARE = 0.06  # typed in lower case, without the full stop
_TYPO_SHARE = 0.02
_CURLY_SHARE = 0.06
_NO_STOP_SHARE = 0.2
_APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")
# Not between digits, and no decimal point; \0 is where two pieces meet.
_PUNCTUATION = re.compile(
    r"""(?<!\d)(?<!\d\0)[,?!;:()"“”]|[,?!;:()"“”](?!\0?\d)|\.(?!\0?\d)|(?<!\w)'|'(?!\w)"""
)


def _as_typed(draft: Draft, rng: Random) -> str:
    """Put the draft's pieces on paper, in one of several hands, and fill in its free arguments.

    A free argument's value is what stands on paper: lower case, with straight quotes.
    """
    pieces, hand = draft.pieces, rng.random()
    if hand < _SPOKEN_SHARE:
        pieces = _as_spoken(pieces)
    elif hand < _SPOKEN_SHARE + _CASUAL_SHARE:
        pieces = [(text.lower(), kind) for text, kind in pieces]
    for text, kind in pieces:
        if kind not in (WORDS, NUMBER):
            said = _one_line(text).lower().translate(_STRAIGHT)
            draft.arguments[kind] = said.rstrip(".?!, ") or said
    if rng.random() < _TYPO_SHARE:
        pieces = _with_typo(pieces, rng)
    command = _one_line("".join(text for text, _ in pieces))
    if hand >= _SPOKEN_SHARE + _CASUAL_SHARE:
        command = command[:1].upper() + command[1:]
        if command[-1:] not in "?!." and rng.random() >= _NO_STOP_SHARE:
            command += "."
    return _APOSTROPHE.sub("’", command) if rng.random() < _CURLY_SHARE else command


def _as_spoken(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """In lower case, without punctuation; free text that is nothing else keeps it."""
    written = "\0".join(text for text, _ in pieces).replace("&", "and").lower()
    spoken = _PUNCTUATION.sub("", written).split("\0")
    return [
        (new if new.strip() or kind == WORDS else old, kind)
        for new, (old, kind) in zip(spoken, pieces, strict=True)
    ]


def _with_typo(pieces: list[tuple[str, str]], rng: Random) -> list[tuple[str, str]]:
    """Swap, lose or double one letter inside one longer word; numbers and free text are safe."""
    places = [
        (i, match.start() + 1, match.end() - 1)
        for i, (text, kind) in enumerate(pieces)
        if kind == WORDS
        for match in re.finditer(r"[a-z]{5,}", text)
    ]
    if not places:
        return pieces
    i, start, end = rng.choice(places)
    text, at = pieces[i][0], rng.randrange(start, end - 1)
    slip = rng.choice((text[at + 1] + text[at], text[at + 1], text[at] * 2 + text[at + 1]))
    return [*pieces[:i], (text[:at] + slip + text[at + 2 :], WORDS), *pieces[i + 1 :]]


def _one_line(text: str) -> str:
    return re.sub(r" +(?=[,.?!]([ ,.?!]|$))", "", " ".join(text.split()))  # not before .hack


# An A/C is an AC, 52° and 52% are 52; but 10:30 is not 1030, nor are -5 and .5 5.
_MARK = r"""[,?!;:…°%/()"'“”„‘’«»¿¡—。，！？、]"""
_UNHEARD = re.compile(rf"(?<!\d){_MARK}|{_MARK}(?!\d)|[-.](?!\d)|(?<=[^\W\d_])[-.]")


def command_key(command: str) -> str:
    """The same for commands that differ in case, spaces and sentence punctuation only.

    Signs before digits, and what stands between them, count: -5 is not 5, nor is 2.5 25.
    """
    heard = _UNHEARD.sub(" ", re.sub("[−–]", "-", command.casefold()))
    return re.sub(r"(?<!\d) | (?!\d)", "", " ".join(heard.split())) or command.strip()
