"""What is wrong with a folder of example files: every place, why, and what to do.

dataset.py stops at the first row that can't be used; here reading goes on, and what only shows
when rows are compared (repetitions, gaps) is found too. Nothing is changed.
"""

from __future__ import annotations

import itertools
import textwrap
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fc_lightning.calls import FunctionCall, UnreadableCall, parse_call, value_key
from fc_lightning.chat import (
    SYSTEM,
    Example,
    encode_command,
    encode_example,
    encode_prompt,
    make_example,
)
from fc_lightning.coverage import never_said
from fc_lightning.dataset import DataError, Row, read_entries, read_example
from fc_lightning.decoding import num_decisions
from fc_lightning.functions import Registry
from fc_lightning.grammar import compile_grammar
from fc_lightning.synthesis import command_key
from fc_lightning.verbatim import not_verbatim

# Kinds of problems, the gravest first, and what to do about each.
FIXES = {
    "unusable file": "mend it: a JSON list of examples; or move it away",
    "missing split": "add a *.json file with that word in its name",
    "not an example": "give the row exactly three strings: system, user, assistant, none empty",
    "unreadable call": "rewrite the response as `synthesize` writes it",
    "unknown function": "correct its name, or name the file that defines it (--functions)",
    "call against its schema": "correct the arguments",
    "can't be written": "write 1 to 80 letters of text, two decimals at most, 1 to 8 elements",
    "not verbatim": "write the text as it was said, or take x-verbatim from its schema",
    "too long": "shorten it, or raise --block_size if the model has more positions",
    "unusual prompt": "write the prompt as `call` will send it, with its system text and markers",
    "contradiction": "one command has two different calls: keep the right one",
    "test seen in training": "remove the command from the training or the test files",
    "repeated": "keep one of the rows",
    "never in training": "add examples of it, or remove it from the domain file",
    "never in test": "add examples of it, or it is not measured",
}
_NUM_SHOWN = 3
_NUM_VALUES_SHOWN = 5


class Problem(NamedTuple):
    """`kind` is a key of FIXES; `where` a file, a row of one, or a function and its argument."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class Diagnosis:
    """All problems of a folder, the gravest first.

    `rich.console.Console().print(diagnosis)` prints a table and the first places of each kind.
    """

    folder: Path
    num_rows: dict[str, int]  # by file
    problems: list[Problem]

    def __rich__(self) -> RenderableType:
        files = f"{len(self.num_rows)} file{'s' * (len(self.num_rows) != 1)}"
        heading = Text(f"{sum(self.num_rows.values()):,} rows in {files} of {self.folder}")
        if not self.problems:
            return Group(heading, Text("nothing is wrong", "green"))
        table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("problem", no_wrap=True)
        table.add_column("count", justify="right")
        table.add_column("what to do")
        places: list[RenderableType] = []
        for kind, found in itertools.groupby(self.problems, key=lambda problem: problem.kind):
            problems = list(found)
            table.add_row(kind, Text(f"{len(problems):,}", "red"), Text(FIXES[kind]))
            places += [Text(kind, "bold"), *map(_place, problems[:_NUM_SHOWN])]
            if (num_more := len(problems) - _NUM_SHOWN) > 0:
                places.append(Text(f"  and {num_more:,} more", "dim"))
        return Group(heading, table, *places)


def _place(problem: Problem) -> RenderableType:
    return Group(
        Padding(Text(problem.where), (0, 0, 0, 2)),
        Padding(Text(textwrap.shorten(problem.what, 200), "dim"), (0, 0, 0, 4)),
    )


class _Reading(NamedTuple):
    """A row, and the call it teaches if that is readable and known."""

    row: Row
    call: FunctionCall | None

    @property
    def where(self) -> str:
        return f"{self.row.file.name}: row {self.row.number}"

    def seen_from(self, other: _Reading) -> str:
        return f"row {self.row.number}" if self.row.file == other.row.file else self.where


def diagnose(folder: Path, registry: Registry, *, block_size: int = 1024) -> Diagnosis:
    """Read all of a data folder's files and find everything that is wrong with them.

    Commands are the same if `command_key` is, whatever their case and sentence punctuation.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds JSON files of examples")
    files = sorted(f for f in folder.glob("*.json") if "train" in f.name or "test" in f.name)
    problems: list[Problem] = []
    by_file: dict[Path, list[_Reading]] = {}
    for file in files:
        rows = list(_read_rows(file, problems))
        by_file[file] = [_check_row(row, registry, block_size, problems) for row in rows]
    train, test = (
        [reading for file in files if split in file.name for reading in by_file[file]]
        for split in ("train", "test")
    )
    problems += _unwritable(registry, [r for readings in by_file.values() for r in readings])
    problems += _missing_splits(files)
    problems += _repetitions(train, test)
    problems += _gaps(registry, train, test)
    gravity = {kind: i for i, kind in enumerate(FIXES)}
    problems.sort(key=lambda problem: gravity[problem.kind])
    return Diagnosis(folder, {f.name: len(readings) for f, readings in by_file.items()}, problems)


# ---------------------------------------------------------------- one row


def _read_rows(file: Path, problems: list[Problem]) -> Iterator[Row]:
    """The rows that are examples; of the others a problem is noted."""
    try:
        entries = read_entries(file)
    except DataError as error:
        problems.append(Problem("unusable file", file.name, str(error).removeprefix(f"{file}: ")))
        return
    for number, entry in enumerate(entries):
        try:
            yield Row(read_example(entry, ""), file, number)
        except DataError as error:
            where = f"{file.name}: row {number}"
            problems.append(Problem("not an example", where, str(error).removeprefix(": ")))


def _check_row(row: Row, registry: Registry, block_size: int, problems: list[Problem]) -> _Reading:
    reading = _Reading(row, None)
    try:
        call = parse_call(row.example.assistant)
    except UnreadableCall as error:
        problems.append(Problem("unreadable call", reading.where, str(error)))
    else:
        if registry.spec(call.name) is None:
            problems.append(Problem("unknown function", reading.where, repr(call.name)))
        else:
            reading = _Reading(row, call)
            if violations := registry.violations(call):
                what = "; ".join(violations)
                problems.append(Problem("call against its schema", reading.where, what))
            for what in not_verbatim(call, row.example.command, registry):
                problems.append(Problem("not verbatim", reading.where, what))
    for kind, what in _text_problems(row.example, block_size):
        problems.append(Problem(kind, reading.where, what))
    return reading


def _text_problems(example: Example, block_size: int) -> Iterator[tuple[str, str]]:
    if encode_prompt(example.system, example.user) != encode_command(example.command):
        is_system = example.system != SYSTEM
        yield "unusual prompt", repr(example.system if is_system else example.user)
    if (num_tokens := _num_tokens(example, block_size)) > block_size:
        yield "too long", f"{num_tokens:,} tokens, {block_size:,} fit"


def _num_tokens(example: Example, block_size: int) -> int:
    """The positions a row needs; 0, without encoding it, where it is sure to fit."""
    # A token is a byte at least, and the words around the three strings are 35 bytes.
    texts = (example.system, example.user, example.assistant)
    if sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) + 40 <= block_size:
        return 0
    return len(encode_example(example).ids) - 1


# ---------------------------------------------------------------- calls by the grammar


def _unwritable(registry: Registry, readings: Iterable[_Reading]) -> Iterator[Problem]:
    """Valid calls that decoding by the grammar can't reach, whatever the model has learned."""
    try:
        first = compile_grammar(registry)
    except ValueError as error:
        yield Problem("can't be written", registry.where, str(error))
        return
    is_writable: dict[str, bool] = {}
    for reading in readings:
        if reading.call is None or registry.violations(reading.call):
            continue
        example = make_example("x", registry.canonical(reading.call))
        if example.assistant not in is_writable:
            encoded = encode_example(example)
            response_ids = encoded.ids[encoded.num_prompt_tokens :]
            is_writable[example.assistant] = num_decisions(first, response_ids) is not None
        if not is_writable[example.assistant]:
            yield Problem("can't be written", reading.where, str(reading.call))


# ---------------------------------------------------------------- rows side by side


def _missing_splits(files: Sequence[Path]) -> Iterator[Problem]:
    for split in ("train", "test"):
        if not any(split in file.name for file in files):
            yield Problem("missing split", split, f"no *.json file with {split!r} in its name")


def _repetitions(train: Sequence[_Reading], test: Sequence[_Reading]) -> Iterator[Problem]:
    """Repeated rows, contradictions, and test commands that are trained on."""
    said: dict[str, list[tuple[str, _Reading]]] = defaultdict(list)
    for split, readings in (("train", train), ("test", test)):
        for reading in readings:
            said[command_key(reading.row.example.command)].append((split, reading))
    for key, group in said.items():
        if key and len(group) > 1:
            yield from _same_command(group)


def _same_command(group: Sequence[tuple[str, _Reading]]) -> Iterator[Problem]:
    first_with: dict[tuple[str, Hashable], _Reading] = {}
    calls: dict[Hashable, _Reading] = {}
    trained = next((reading for split, reading in group if split == "train"), None)
    for split, reading in group:
        where, command = reading.where, repr(reading.row.example.command)
        key = _call_key(reading.call)
        if (first := first_with.setdefault((split, key), reading)) is not reading:
            yield Problem("repeated", where, f"{command}, as in {first.seen_from(reading)}")
        if reading.call and key not in calls:
            for other in list(calls.values())[:1]:
                what = f"{command}: {reading.call}, but {other.seen_from(reading)}: {other.call}"
                yield Problem("contradiction", where, what)
            calls[key] = reading
        if split == "test" and trained:
            yield Problem(
                "test seen in training", where, f"{command}, as in {trained.seen_from(reading)}"
            )


def _call_key(call: FunctionCall | None) -> Hashable:
    """The same for equal calls, whatever the order of arguments and of array elements."""
    if call is None:
        return None
    arguments = {
        (name, frozenset(map(value_key, value)) if isinstance(value, list) else value_key(value))
        for name, value in call.arguments.items()
    }
    return call.name, frozenset(arguments)


def _gaps(
    registry: Registry, train: Sequence[_Reading], test: Sequence[_Reading]
) -> Iterator[Problem]:
    """Calls and values that no training row has, and functions that no test row has."""
    trained = {reading.call.name for reading in train if reading.call}
    tested = {reading.call.function for reading in test if reading.call}
    for name in registry.call_names:
        if train and name not in trained:
            yield Problem("never in training", name, "no row with this call")
    for name in registry.by_name:
        if test and name not in tested:
            yield Problem("never in test", name, "no row with this function")
    calls = [reading.call for reading in train if reading.call]
    for (name, argument), values in never_said(registry, calls).items():
        if name in trained:
            shown = ", ".join(values[:_NUM_VALUES_SHOWN])
            if (num_more := len(values) - _NUM_VALUES_SHOWN) > 0:
                shown += f" and {num_more:,} more"
            yield Problem("never in training", f"{name}: {argument}", shown)
