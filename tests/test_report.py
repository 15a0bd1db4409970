"""The report of four answers, one of each fate, as JSON, as tables and as a page."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from fc_lightning.calls import FunctionCall, render_call
from fc_lightning.chat import make_example
from fc_lightning.dataset import Row
from fc_lightning.functions import load_registry
from fc_lightning.metrics import ERROR_KINDS, CallMetrics, compare_calls, read_call
from fc_lightning.report import MEANINGS, Evaluation, Prediction, Report, html_page

REGISTRY = load_registry()
FAN = FunctionCall("set_fan_speed", {"speed": "low", "area": ["driver"]})
FAST = FunctionCall("set_fan_speed", {"speed": "high", "area": ["driver"]})
INCOMPLETE = FunctionCall("possibly_incomplete_set_fan_speed", {"speed": ""})
ENGINE = FunctionCall("start_engine", {})
CASES = [
    ("fan low for me", FAN, render_call(FAN), 0.9),
    ("<b>fan & [bold]low", FAN, render_call(FAST), 0.7),
    ("set the fan", INCOMPLETE, render_call(ENGINE), 0.3),
    ("Starte … 🚗", ENGINE, "<functioncall> {\ud83d <script>", 0.2),
]


def evaluation_of(cases):
    metrics, predictions = CallMetrics(REGISTRY), []
    for i, (command, expected, text, confidence) in enumerate(cases):
        call = read_call(text)
        metrics.update([expected], [call])
        row = Row(make_example(command, expected), Path("some/test_a.json"), i)
        comparison = compare_calls(REGISTRY, expected, call)
        predictions.append(Prediction(row, expected, text, call, confidence, comparison))
    return Evaluation(tuple(predictions), metrics, duration_s=0.5)


@pytest.fixture(scope="module")
def report():
    return Report(evaluation_of(CASES), evaluation_of(CASES))


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report.write(folder)
    return folder


def test_predictions_are_one_object_a_line_in_input_order(folder):
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    assert [e["user"] for e in entries] == [command for command, *_ in CASES]
    assert entries[1] == {
        "user": "<b>fan & [bold]low",
        "expected": {"name": "set_fan_speed", "arguments": {"speed": "low", "area": ["driver"]}},
        "predicted": render_call(FAST),
        "call": {"name": "set_fan_speed", "arguments": {"speed": "high", "area": ["driver"]}},
        "is_match": False,
        "is_valid": True,
        "confidence": 0.7,
        "errors": [
            {
                "kind": "IncorrectParameterValue",
                "argument": "speed",
                "expected": "low",
                "predicted": "high",
            }
        ],
    }
    assert entries[3]["call"] is None and not entries[3]["is_valid"]
    assert entries[3]["predicted"] == CASES[3][2]  # half a surrogate pair included


def test_report_json_holds_all_measures_with_null_for_nothing(folder):
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert found["num_examples"] == 4 and found["files"] == {"some/test_a.json": 4}
    way = found["constrained"]
    assert (way["call_match"], way["function_match"], way["valid"]) == (0.25, 0.5, 0.75)
    assert way["call_match_interval"] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    assert (way["complete"]["num_examples"], way["incomplete"]["num_examples"]) == (3, 1)
    assert way["by_function"]["set_fan_speed"]["call_match"] == 0.5
    assert way["by_function"]["lock_doors"]["call_match"] is None
    assert way["errors"] == {kind: 0 for kind in ERROR_KINDS} | {
        "IncorrectParameterValue": 1,
        "InvalidFunction": 1,
        "InvalidOutput": 1,
    }
    assert sum(map(sum, way["confusion"]["counts"])) == 4
    assert way["commands_per_s"] == 8
    assert way["calibration"]["thresholds"]["0.99"]["threshold"] == 0.9
    assert way["calibration"]["curve"][-1]["coverage"] == 1


def test_a_long_curve_is_thinned_and_keeps_its_end():
    cases = [("start", ENGINE, render_call(ENGINE), i / 1000) for i in range(1000)]
    curve = evaluation_of(cases).as_json()["calibration"]["curve"]
    assert len(curve) == 200
    assert curve[-1] == {"threshold": 0.0, "coverage": 1.0, "accuracy": 1.0}


def test_a_failed_write_leaves_the_file_before_it(report, folder, monkeypatch):
    before = (folder / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.write(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_the_tables_fit_eighty_columns_and_cut_nothing(report):
    shown = io.StringIO()
    Console(file=shown, width=80).print(report)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in shown.getvalue()
    words = [line.split() for line in lines]
    assert ["function", "match", "50.0%", "50.0%"] in words
    assert ["set_fan_speed", "2", "50.0%", "1", "0.0%"] in words
    assert ["InvalidOutput", "1", "1"] in words


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_loads_nothing_and_runs_nothing(report):
    page = Page()
    page.feed(html_page(report))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    links = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "data")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in "".join(page.text)


def test_the_page_shows_words_as_they_were_said(report):
    page = Page()
    page.feed(html_page(report))
    assert "<b>fan & [bold]low" in page.text
    assert "Starte … 🚗" in page.text
    assert "<functioncall> {\ud83d <script>" in page.text


def test_the_page_has_every_part(report):
    page = Page()
    page.feed(html_page(report))
    text = " ".join(page.text)
    assert page.tags.count("svg") == 2
    assert page.tags.count("details") == 3  # one for each kind of error that occurs
    for part in ("set_fan_speed …", "unreadable", "expected calibration error", "99.5%"):
        assert part in text
    assert MEANINGS["InvalidOutput"] in text
    assert "$" not in text


def test_an_accuracy_that_no_threshold_reaches_is_said_so():
    wrong = evaluation_of([("start", ENGINE, render_call(FAN), 0.9)])
    assert "<td>not reached</td>" in html_page(Report(wrong, wrong))


def test_every_kind_of_error_has_a_meaning():
    assert tuple(MEANINGS) == ERROR_KINDS
