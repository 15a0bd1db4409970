"""A scripted caller over a few rows: what is asked of it, and what is made of its answers."""

import dataclasses
import io
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fc_lightning.caller import FunctionCaller
from fc_lightning.calls import FunctionCall, render_call
from fc_lightning.chat import SYSTEM, Example, make_example
from fc_lightning.dataset import DataError, Row
from fc_lightning.evaluation import evaluate
from fc_lightning.functions import load_registry
from fc_lightning.gpt import GPT, GPTConfig

Response = namedtuple("Response", "text confidence")
LOCK = FunctionCall("lock_doors", {"lock_state": "lock"})
UNLOCK = FunctionCall("lock_doors", {"lock_state": "unlock"})
ENGINE = FunctionCall("start_engine", {})


class ScriptedCaller:
    """Answers from a table; what it was asked is kept."""

    registry = load_registry()

    def __init__(self, constrained, unconstrained=None):
        self.answers = {True: constrained, False: unconstrained or constrained}
        self.asked = []

    def respond(self, commands, *, systems, constrained, on_progress):
        self.asked.append((list(commands), constrained))
        self.systems = list(systems)
        on_progress(len(commands))
        return [Response(*self.answers[constrained][command]) for command in commands]


def rows_of(*pairs):
    return [
        Row(make_example(command, call), Path("data/test.json"), i)
        for i, (command, call) in enumerate(pairs)
    ]


def untrained_caller():
    torch.manual_seed(0)
    shape = GPTConfig(block_size=512, n_layer=1, n_head=2, n_embd=16, bias=False)
    return FunctionCaller(GPT(shape), load_registry())


def run(caller, rows, *args):
    return evaluate(caller, rows, *args, console=Console(file=io.StringIO()))


def test_every_command_is_asked_twice_in_input_order():
    rows = rows_of(("lock it", LOCK), ("unlock it", UNLOCK), ("start", ENGINE))
    caller = ScriptedCaller({row.example.command: ("", 0.5) for row in rows})
    report = run(caller, rows)
    commands = ["lock it", "unlock it", "start"]
    assert caller.asked == [(commands, True), (commands, False)]
    assert [p.row.number for p in report.constrained.predictions] == [0, 1, 2]


def test_every_command_is_asked_after_its_own_system_prompt():
    rows = rows_of(("lock it", LOCK), ("start", ENGINE))
    own = dataclasses.replace(rows[1].example, system="You are a car.")
    rows[1] = dataclasses.replace(rows[1], example=own)
    caller = ScriptedCaller({row.example.command: ("", 0.5) for row in rows})
    run(caller, rows)
    assert caller.systems == [SYSTEM, "You are a car."]


def test_both_ways_of_decoding_are_measured_apart():
    rows = rows_of(("lock it", LOCK), ("start", ENGINE))
    right = {"lock it": (render_call(LOCK), 0.9), "start": (render_call(ENGINE), 0.8)}
    garbled = right | {"start": ('<functioncall> {"name": "sta', 0.1)}
    report = run(ScriptedCaller(right, garbled), rows)
    assert report.constrained.measures["call_match"] == 1
    assert report.unconstrained.measures["call_match"] == 0.5
    assert report.unconstrained.measures["errors/InvalidOutput"] == 1
    assert report.unconstrained.predictions[1].call is None


def test_confidence_is_calibrated_against_call_match():
    rows = rows_of(("lock it", LOCK), ("start", ENGINE))
    answers = {"lock it": (render_call(LOCK), 1.0), "start": (render_call(LOCK), 0.6)}
    report = run(ScriptedCaller(answers), rows)
    assert report.constrained.calibration.expected_error == pytest.approx(0.3)
    assert report.constrained.calibration.threshold_for(1.0).threshold == 1.0


def test_rows_that_cant_be_evaluated_are_named_before_anything_is_asked():
    rows = rows_of(("lock it", LOCK), ("open", FunctionCall("open_roof", {})))
    rows.append(Row(Example("", "", "just talk"), Path("data/b.json"), 7))
    caller = ScriptedCaller({})
    with pytest.raises(DataError) as error:
        run(caller, rows)
    assert "2 of 3 examples" in str(error.value)
    assert "data/test.json: row 1: calls the unknown function 'open_roof'" in str(error.value)
    assert "data/b.json: row 7: no readable call" in str(error.value)
    assert caller.asked == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [("\x00", "the command is empty"), ("go " * 900, "the command is too long")],
)
def test_a_command_that_cant_be_answered_is_named(command, problem):
    rows = rows_of(("lock it", LOCK), (command, LOCK))
    with pytest.raises(DataError, match=rf"^data/test.json: row 1: {problem}"):
        run(untrained_caller(), rows)
    with pytest.raises(DataError, match=rf"^data/test.json: row 0: {problem}"):
        run(untrained_caller(), rows_of((command, LOCK)))


def test_only_the_first_ten_bad_rows_are_listed():
    rows = rows_of(*[(f"open {i}", FunctionCall("open_roof", {})) for i in range(13)])
    with pytest.raises(DataError, match="and 3 more") as error:
        run(ScriptedCaller({}), rows)
    assert str(error.value).count("row ") == 10


def test_no_rows_is_an_error():
    with pytest.raises(DataError, match="no examples"):
        run(ScriptedCaller({}), [])


def test_an_output_that_is_a_file_is_refused_before_anything_is_asked(tmp_path):
    (tmp_path / "taken").write_text("")
    caller = ScriptedCaller({})
    with pytest.raises(ValueError, match="taken: can't be made a folder"):
        run(caller, rows_of(("lock it", LOCK)), tmp_path / "taken")
    assert caller.asked == []


def test_the_files_are_written_only_with_an_output(tmp_path):
    rows = rows_of(("lock it", LOCK))
    caller = ScriptedCaller({"lock it": (render_call(LOCK), 1.0)})
    run(caller, rows, tmp_path / "new" / "folder")
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "predictions-unconstrained.jsonl",
        "predictions.jsonl",
        "report.html",
        "report.json",
    ]


def test_an_untrained_model_writes_only_valid_calls_when_constrained():
    commands = [f"turn it up to {i}, don't wait" for i in range(2)]
    report = run(untrained_caller(), rows_of(*[(command, ENGINE) for command in commands]))
    assert report.constrained.measures["valid"] == 1
    assert report.unconstrained.measures["valid"] == 0
    assert all(0 <= p.confidence <= 1 for p in report.constrained.predictions)


def test_progress_is_shown_for_both_ways():
    shown = io.StringIO()
    caller = ScriptedCaller({"lock it": (render_call(LOCK), 1.0)})
    evaluate(caller, rows_of(("lock it", LOCK)), console=Console(file=shown, width=80))
    assert "unconstrained" in shown.getvalue() and "100%" in shown.getvalue()
