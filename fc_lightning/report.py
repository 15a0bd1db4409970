"""What an evaluation found: as numbers, as JSON, as tables in a terminal, and as one web page.

Nothing is run or judged here: evaluation.py does the one, metrics.py the other.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fc_lightning.calibration import Calibration, calibrate, calibration_figure
from fc_lightning.calls import INCOMPLETE_PREFIX, FunctionCall
from fc_lightning.dataset import Row
from fc_lightning.metrics import (
    ERROR_KINDS,
    CallError,
    CallMetrics,
    Comparison,
    confusion_figure,
    wilson_interval,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WANTED_ACCURACIES = (0.9, 0.95, 0.98, 0.99, 0.995)
MEANINGS = {
    "InvalidOutput": "unreadable as a call",
    "HallucinatedFunction": "a function that does not exist",
    "InvalidFunction": "another function than expected",
    "MissingParameter": "an expected argument is not there",
    "HallucinatedParameter": "an argument that is not expected",
    "IncorrectParameterTypeArray": "one value for a list, or a list for one value",
    "HallucinatedParameterValue": "a value outside the schema",
    "IncorrectParameterValue": "another value than expected",
    "HallucinatedArrayElement": "a list element outside the schema",
    "IncorrectArrayElement": "a list element that is not expected, or a repeated one",
    "MissingArrayElement": "an expected list element is not there",
}
_PAGE = Path(__file__).parent / "assets" / "report.html"
_MAX_CURVE_POINTS = 200
_MAX_EXAMPLES_SHOWN = 20


@dataclass(frozen=True)
class Prediction:
    """One example answered and judged; `call` is None where `text` is unreadable."""

    row: Row
    expected: FunctionCall
    text: str
    call: FunctionCall | None
    confidence: float
    comparison: Comparison

    def as_json(self) -> dict[str, Any]:
        return {
            "user": self.row.example.command,
            "expected": _call_json(self.expected),
            "predicted": self.text,
            "call": self.call and _call_json(self.call),
            "is_match": self.comparison.is_match,
            "is_valid": self.comparison.is_valid,
            "confidence": self.confidence,
            "errors": [error._asdict() for error in self.comparison.errors],
        }


@dataclass(frozen=True)
class Evaluation:
    """All predictions of one way of decoding, in input order, and what they add up to."""

    predictions: tuple[Prediction, ...]
    metrics: CallMetrics
    duration_s: float

    @cached_property
    def measures(self) -> dict[str, float]:
        """`CallMetrics.compute()` as plain numbers."""
        return {name: value.item() for name, value in self.metrics.compute().items()}

    @cached_property
    def calibration(self) -> Calibration:
        """Confidence against call match."""
        matches = [p.comparison.is_match for p in self.predictions]
        return calibrate([p.confidence for p in self.predictions], matches)

    @property
    def commands_per_s(self) -> float:
        return len(self.predictions) / self.duration_s if self.duration_s else math.nan

    def measures_of(self, call_names: Iterable[str]) -> dict[str, Any]:
        """The measures over examples that expect one of these names, with Wilson's interval."""
        measures = {n: v.item() for n, v in self.metrics.measures(call_names).items()}
        num_examples = int(measures.pop("num_examples"))
        num_matches = round(measures["call_match"] * num_examples) if num_examples else 0
        interval = wilson_interval(num_matches, num_examples)
        return {"num_examples": num_examples, "call_match_interval": interval} | measures

    def as_json(self) -> dict[str, Any]:
        names = self.metrics.call_names
        decision = ("incomplete_precision", "incomplete_recall", "incomplete_f1")
        return {
            **_nested(self.measures_of(names)),
            **{name: self.measures[name] for name in decision},
            "complete": _nested(self.measures_of(_complete(names))),
            "incomplete": _nested(self.measures_of(_incomplete(names))),
            "by_function": {name: _nested(self.measures_of([name])) for name in names},
            "confusion": {
                "expected": names,
                "predicted": [*names, "unknown", "unreadable"],
                "counts": self.metrics.confusion_matrix().tolist(),
            },
            "calibration": _calibration_json(self.calibration),
            "commands_per_s": self.commands_per_s,
        }


@dataclass(frozen=True)
class Report:
    """The same examples with constrained and with unconstrained decoding.

    `rich.console.Console().print(report)` prints it as tables.
    """

    constrained: Evaluation
    unconstrained: Evaluation

    @property
    def num_by_file(self) -> dict[str, int]:
        files = [str(p.row.file) for p in self.constrained.predictions]
        return {file: files.count(file) for file in dict.fromkeys(files)}

    def as_json(self) -> dict[str, Any]:
        return {
            "num_examples": len(self.constrained.predictions),
            "files": self.num_by_file,
            "constrained": self.constrained.as_json(),
            "unconstrained": self.unconstrained.as_json(),
        }

    def write(self, folder: Path) -> None:
        """Write predictions.jsonl, predictions-unconstrained.jsonl, report.json, report.html.

        Each file appears whole or not at all.
        """
        for name, evaluation in (
            ("predictions.jsonl", self.constrained),
            ("predictions-unconstrained.jsonl", self.unconstrained),
        ):
            objects = (prediction.as_json() for prediction in evaluation.predictions)
            lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in objects)
            _write_whole(folder / name, "".join(lines))
        found = _rounded(self.as_json())
        text = json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1)
        _write_whole(folder / "report.json", f"{text}\n")
        _write_whole(folder / "report.html", html_page(self))

    def __rich__(self) -> RenderableType:
        headline = _table("", "constrained", "unconstrained", rows=_headline_rows(self))
        columns = ("complete", "call match", "incomplete", "call match")
        functions = _table("function", *columns, rows=_function_rows(self.constrained))
        errors = _table("error", "constrained", "unconstrained", rows=_error_rows(self))
        return Group(headline, functions, errors)


def _complete(call_names: Sequence[str]) -> list[str]:
    return [name for name in call_names if not name.startswith(INCOMPLETE_PREFIX)]


def _incomplete(call_names: Sequence[str]) -> list[str]:
    return [name for name in call_names if name.startswith(INCOMPLETE_PREFIX)]


# ---------------------------------------------------------------- JSON


def _call_json(call: FunctionCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": dict(call.arguments)}


def _nested(measures: dict[str, Any]) -> dict[str, Any]:
    """Error counts apart from the ratios, as whole numbers."""
    errors = {kind: int(measures[f"errors/{kind}"]) for kind in ERROR_KINDS}
    return {n: v for n, v in measures.items() if "/" not in n} | {"errors": errors}


def _calibration_json(calibration: Calibration) -> dict[str, Any]:
    step = max(1, math.ceil(len(calibration.curve) / _MAX_CURVE_POINTS))
    reached = {str(a): calibration.threshold_for(a) for a in WANTED_ACCURACIES}
    return {
        "expected_error": calibration.expected_error,
        "bins": [b._asdict() for b in calibration.bins],
        "thresholds": {a: point and point._asdict() for a, point in reached.items()},
        # Thinned from its end, so that the point where everything is accepted stays.
        "curve": [point._asdict() for point in calibration.curve[::-step][::-1]],
    }


def _rounded(value: Any) -> Any:
    """Floats to the seven digits they have, and null for nan, which JSON lacks."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def _write_whole(path: Path, text: str) -> None:
    """Write beside the file, then move into place. Half a surrogate pair becomes its escape."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


# ---------------------------------------------------------------- tables
# Rows of plain strings, shown in a terminal and on the page alike.


def _percent(ratio: float) -> str:
    return "–" if math.isnan(ratio) else f"{100 * ratio:.1f}%"


def _with_interval(measures: dict[str, Any]) -> str:
    if not measures["num_examples"]:
        return "–"
    low, high = measures["call_match_interval"]
    return f"{_percent(measures['call_match'])} ({100 * low:.1f} to {100 * high:.1f})"


def _f1(measures: dict[str, float], prefix: str) -> str:
    f1, precision, recall = (measures[f"{prefix}_{name}"] for name in ("f1", "precision", "recall"))
    if math.isnan(f1):
        return "–"
    return f"{_percent(f1)} ({_percent(precision)}, {_percent(recall)})"


def _headline(evaluation: Evaluation) -> dict[str, str]:
    measures, names = evaluation.measures, evaluation.metrics.call_names
    every, complete, incomplete = (
        evaluation.measures_of(chosen) for chosen in (names, _complete(names), _incomplete(names))
    )
    return {
        "call match (95% interval)": _with_interval(every),
        f"· {complete['num_examples']:,} complete requests": _with_interval(complete),
        f"· {incomplete['num_examples']:,} incomplete requests": _with_interval(incomplete),
        "function match": _percent(measures["function_match"]),
        "argument match": _percent(measures["argument_match"]),
        "argument F1 (precision, recall)": _f1(measures, "argument"),
        "incomplete F1 (precision, recall)": _f1(measures, "incomplete"),
        "valid by the schema": _percent(measures["valid"]),
        "expected calibration error": f"{evaluation.calibration.expected_error:.3f}",
        "commands per second": f"{evaluation.commands_per_s:,.1f}",
    }


def _headline_rows(report: Report) -> list[tuple[str, ...]]:
    constrained, unconstrained = _headline(report.constrained), _headline(report.unconstrained)
    return [(label, shown, unconstrained[label]) for label, shown in constrained.items()]


def _function_rows(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """Each function that was expected, complete and incomplete requests side by side."""
    for function in evaluation.metrics.registry.by_name:
        forms = [evaluation.measures_of([n]) for n in (function, INCOMPLETE_PREFIX + function)]
        if any(form["num_examples"] for form in forms):
            cells = [(f"{form['num_examples']:,}", _percent(form["call_match"])) for form in forms]
            yield function, *cells[0], *cells[1]


def _call_name_rows(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """Each call name that was expected in full: complete requests, then incomplete ones."""
    ratios = ("function_match", "argument_match", "argument_f1", "valid")
    for name in evaluation.metrics.call_names:
        measures = evaluation.measures_of([name])
        if measures["num_examples"]:
            function = name.removeprefix(INCOMPLETE_PREFIX)
            yield (
                function if function == name else f"{function} …",
                f"{measures['num_examples']:,}",
                _with_interval(measures),
                *(_percent(measures[ratio]) for ratio in ratios),
            )


def _error_rows(report: Report) -> Iterator[tuple[str, ...]]:
    ways = (report.constrained, report.unconstrained)
    for kind in ERROR_KINDS:
        yield kind, *(f"{int(way.measures[f'errors/{kind}']):,}" for way in ways)


def _table(first: str, *columns: str, rows: Iterable[Sequence[str]]) -> Table:
    """A table that fits 80 columns: names on the left, figures on the right."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


# ---------------------------------------------------------------- the page


def html_page(report: Report) -> str:
    """One page that needs nothing else: no script, no network, dark where the reader's is."""
    evaluation = report.constrained
    names = evaluation.metrics.call_names
    files = ", ".join(
        f"{Path(file).name} ({count:,})" for file, count in report.num_by_file.items()
    )
    every = evaluation.measures_of(names)
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        num_examples=f"{len(evaluation.predictions):,}",
        files=escape(files),
        call_match=_percent(every["call_match"]),
        interval="{:.1f} to {:.1f}%".format(*(100 * v for v in every["call_match_interval"])),
        function_match=_percent(every["function_match"]),
        argument_f1=_percent(every["argument_f1"]),
        valid=_percent(every["valid"]),
        headline=_html_table("", "constrained", "unconstrained", rows=_headline_rows(report)),
        functions=_html_table(
            "function", "requests", "call match", "function match", "argument match",
            "argument F1", "valid", rows=_call_name_rows(evaluation),
        ),
        confusion=_svg(confusion_figure(evaluation.metrics.confusion_matrix(), names)),
        errors="\n".join(_error_sections(report)),
        calibration=_svg(calibration_figure(evaluation.calibration)),
        thresholds=_html_table(
            "wanted call match", "act from confidence", "commands acted on", "call match reached",
            rows=_threshold_rows(evaluation.calibration),
        ),
    )  # fmt: skip


def _threshold_rows(calibration: Calibration) -> Iterator[tuple[str, ...]]:
    for wanted in WANTED_ACCURACIES:
        point = calibration.threshold_for(wanted)
        if point is None:
            yield f"{100 * wanted:g}%", "not reached", "–", "–"
        else:
            threshold, coverage, accuracy = point
            # Rounded down: a threshold shown too high would refuse what it was chosen to accept.
            shown = f"{math.floor(threshold * 1e4) / 1e4:.4f}"
            yield f"{100 * wanted:g}%", shown, _percent(coverage), _percent(accuracy)


def _html_table(*columns: str, rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _error_sections(report: Report) -> Iterator[str]:
    """A section to unfold for each kind of error that occurs, with examples.

    They are taken from constrained decoding, and from unconstrained where that has none.
    """
    ways = {"constrained": report.constrained, "unconstrained": report.unconstrained}
    for kind in ERROR_KINDS:
        found = {way: list(_having(evaluation, kind)) for way, evaluation in ways.items()}
        way = next((way for way, examples in found.items() if examples), None)
        if way is None:
            continue
        counts = ", ".join(f"{way} {len(examples):,}" for way, examples in found.items())
        shown = found[way][:_MAX_EXAMPLES_SHOWN]
        table = _html_table(
            f"said ({len(shown)} of {len(found[way]):,}, {way})",
            "expected", "predicted", "argument", "confidence",
            rows=[_example_row(prediction, error) for prediction, error in shown],
        )  # fmt: skip
        yield (
            f"<details><summary><b>{kind}</b> {escape(MEANINGS[kind])}"
            f' <span class="count">{counts}</span></summary>\n{table}</details>'
        )


def _having(evaluation: Evaluation, kind: str) -> Iterator[tuple[Prediction, CallError]]:
    for prediction in evaluation.predictions:
        for error in prediction.comparison.errors:
            if error.kind == kind:
                yield prediction, error


def _example_row(prediction: Prediction, error: CallError) -> tuple[str, ...]:
    predicted = str(prediction.call) if prediction.call else prediction.text
    return (
        prediction.row.example.command,
        str(prediction.expected),
        predicted,
        error.argument or "",
        f"{prediction.confidence:.2f}",
    )


def _svg(figure: Figure) -> str:
    """The figure as an inline element whose text stays text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
