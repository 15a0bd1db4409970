"""Ask a caller what a set of examples asks for, and judge its answers.

Runs anything that answers like a FunctionCaller, constrained and unconstrained side by side. What
a measure means is metrics.py's business, what becomes of the answers report.py's. No Lightning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import Progress

from fc_lightning.caller import CommandError
from fc_lightning.calls import FunctionCall
from fc_lightning.dataset import DataError, Row
from fc_lightning.functions import Registry
from fc_lightning.metrics import CallMetrics, compare_calls, read_call
from fc_lightning.report import Evaluation, Prediction, Report


class Response(Protocol):
    """What a model said, and the probability of the choices it made."""

    @property
    def text(self) -> str: ...
    @property
    def confidence(self) -> float: ...


class Caller(Protocol):
    """What is evaluated: a FunctionCaller, or any other way of answering commands.

    `respond` answers in order, each command after its own system prompt, and tells `on_progress`
    how many more commands are answered.
    """

    @property
    def registry(self) -> Registry: ...
    def respond(
        self,
        commands: Sequence[str],
        *,
        systems: Sequence[str],
        constrained: bool,
        on_progress: Callable[[int], object],
    ) -> Sequence[Response]: ...


def evaluate(
    caller: Caller,
    rows: Sequence[Row],
    output: Path | None = None,
    *,
    console: Console | None = None,
) -> Report:
    """Answer every row's command twice, constrained and unconstrained, and judge the answers.

    With `output`, a folder, the report is written there (see `Report.write`). Progress is shown
    on `console`, stderr by default.

    Raises:
        DataError: there are no rows, or some that can't be evaluated, because the expected call
            is unreadable or unknown to the caller, or the command empty or too long. Raised
            before the model runs, with file and row.
        ValueError: `output` can't be a folder.
    """
    expected = _expected_calls(rows, caller.registry)
    if output is not None:
        _make_folder(output)
    with Progress(console=console or Console(stderr=True)) as progress:
        constrained, unconstrained = (
            _evaluate(caller, rows, expected, constrained=constrained, progress=progress)
            for constrained in (True, False)
        )
    report = Report(constrained, unconstrained)
    if output is not None:
        report.write(output)
    return report


def _expected_calls(rows: Sequence[Row], registry: Registry) -> list[FunctionCall]:
    if not rows:
        raise DataError("there are no examples to evaluate")
    calls, problems = [], []
    for row in rows:
        call = read_call(row.example.assistant)
        if call is None:
            problems.append(f"{row.where}: no readable call")
        elif registry.spec(call.name) is None:
            problems.append(f"{row.where}: calls the unknown function {call.name!r}")
        else:
            calls.append(call)
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        listed = "\n".join(f"  {line}" for line in problems[:10] + more)
        raise DataError(
            f"{len(problems)} of {len(rows)} examples can't be evaluated;"
            f" correct or remove them (`doctor` lists all):\n{listed}"
        )
    return calls


def _evaluate(
    caller: Caller,
    rows: Sequence[Row],
    expected: Sequence[FunctionCall],
    *,
    constrained: bool,
    progress: Progress,
) -> Evaluation:
    task = progress.add_task("constrained" if constrained else "unconstrained", total=len(rows))
    start = time.perf_counter()
    try:
        responses = caller.respond(
            [row.example.command for row in rows],
            systems=[row.example.system for row in rows],
            constrained=constrained,
            on_progress=lambda num_more: progress.advance(task, num_more),
        )
    except CommandError as error:
        raise DataError(f"{rows[error.number or 0].where}: {error.problem}") from None
    duration_s = time.perf_counter() - start
    predictions = tuple(_judge(caller.registry, rows, expected, responses))
    metrics = CallMetrics(caller.registry)
    metrics.update(expected, [p.call for p in predictions])
    return Evaluation(predictions, metrics, duration_s)


def _judge(
    registry: Registry,
    rows: Sequence[Row],
    expected: Sequence[FunctionCall],
    responses: Sequence[Response],
) -> Iterator[Prediction]:
    for row, wanted, response in zip(rows, expected, responses, strict=True):
        call = read_call(response.text)
        comparison = compare_calls(registry, wanted, call)
        yield Prediction(row, wanted, response.text, call, response.confidence, comparison)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder}: can't be made a folder ({error.strerror}); choose another output"
        ) from None
