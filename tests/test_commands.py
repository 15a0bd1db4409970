"""Commands as they are typed, with a tiny untrained model where one is needed."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fc_lightning.__main__ import main
from fc_lightning.calls import FunctionCall
from fc_lightning.chat import make_example
from fc_lightning.checkpoint import load_gpt
from fc_lightning.export import save_hf, save_nanogpt
from fc_lightning.functions import load_registry
from fc_lightning.gpt import GPT, GPTConfig

torch.set_num_threads(1)  # models this small only lose by more


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=512, n_layer=1, n_head=2, n_embd=16))
    return save_nanogpt(model, tmp_path_factory.mktemp("model") / "ckpt.pt")


@pytest.fixture
def run(capsys):
    """Exit code, stdout and stderr of a command line."""

    def run_command(*args):
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run_command


def feed(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


def write_rows(folder, name, *pairs):
    rows = [vars(make_example(*pair)) for pair in pairs]
    (folder / name).write_text(json.dumps(rows))


LOCK = FunctionCall("lock_doors", {"lock_state": "lock"})


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("synthesise", "synthesise: no such command; the nearest is synthesize"),
        ("valdate", "valdate: no such command; the nearest is validate"),
        ("xyzzy", "xyzzy: no such command; python -m fc_lightning --help lists them"),
        ("benchmark", "benchmark: say what to measure: benchmark train"),
        ("doctor --dta x", "doctor: no option --dta; the nearest is --data"),
        ("doctor --dat x", "doctor: no option --dat; the nearest is --data"),
        ("doctor", "doctor: needs --data"),
        ("inspect --data x --row 1.5", "inspect: --row takes a whole number, not 1.5"),
        ("synthesize --output", "synthesize: argument --output: expected one argument"),
        ("call a --checkpoint x --int8 b", "call: this is out of place: b"),
        ("doctor --data nowhere", "doctor: nowhere: no such folder"),
        ("call --checkpoint nowhere a", "call: nowhere: no such file or folder"),
        ("evaluate --checkpoint x --data nowhere --output y", "evaluate: nowhere: no such folder"),
        (
            "export --checkpoint x --format gguf --output y",
            "export: --format takes 'nanogpt', 'hf',",
        ),
        (
            "benchmark decode --num_commands few",
            "benchmark: --num_commands takes a whole number, not few",
        ),
        (
            "benchmark decode --shape huge",
            "benchmark: --shape takes 'tiny', '20M', 'gpt2', 'gpt2-medium', not huge",
        ),
    ],
)
def test_what_cant_be_done_is_said_in_one_line(run, line, message):
    code, out, err = run(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"fc_lightning {message}")


def test_help_says_what_each_option_is_for(run):
    code, out, _ = run("synthesize", "--help")
    assert code == 0
    assert "Write examples for training and test" in out
    words = " ".join(out.split())
    assert "--output OUTPUT new folder for fc_train.json and fc_test.json (required)" in words
    assert "--seed SEED the same seed writes the same files (default: 0)" in words


@pytest.mark.parametrize("command", ["doctor", "inspect", "call", "evaluate", "export"])
def test_every_option_has_its_help(run, command):
    _, out, _ = run(command, "--help")
    options = out.partition("options:\n")[2]
    entries = [e for e in options.split("\n  -") if e]
    assert len(entries) >= 4
    assert all(len(entry.split()) > 2 and "None" not in entry for entry in entries)


def imported_by(code):
    """Which of the heavy packages a fresh Python has imported after `code`."""
    heavy = ("torch", "torch._dynamo", "sympy", "lightning", "torchmetrics", "transformers")
    code = f"{code}\nimport sys\nprint('heavy:', *(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.rpartition("heavy:")[2].split()


def test_the_package_and_its_help_import_nothing_heavy():
    code = "import fc_lightning\nfrom fc_lightning.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: pass"
    assert imported_by(code) == []


def test_a_call_imports_torch_and_no_more(checkpoint):
    args = ["call", "--checkpoint", str(checkpoint), "lock the doors"]
    assert imported_by(f"from fc_lightning.__main__ import main\nmain({args})") == ["torch"]


def test_a_reader_that_goes_away_ends_a_command_quietly(checkpoint):
    args = [sys.executable, "-m", "fc_lightning", "call", "--checkpoint", checkpoint]
    with subprocess.Popen(
        args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.stdin.write(b"lock the doors\n" * 3)
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


# ---------------------------------------------------------------- data


def test_synthesized_examples_are_written_counted_and_repeatable(run, tmp_path):
    args = ("synthesize", "--num_examples", 400, "--seed", 3, "--output")
    code, out, _ = run(*args, tmp_path / "a")
    assert code == 0
    assert f"{tmp_path / 'a' / 'fc_train.json'}: 360 examples\n" in out
    assert f"{tmp_path / 'a' / 'fc_test.json'}: 40 examples\n" in out
    train = json.loads((tmp_path / "a" / "fc_train.json").read_text())
    count = sum('"name": "set_temperature"' in row["assistant"] for row in train)
    [line] = [line.split() for line in out.splitlines() if line.startswith(" set_temperature ")]
    assert line[1] == str(count)
    said = {row["assistant"] for row in train if '"name": "set_cruise_control"' in row["assistant"]}
    [line] = [line for line in out.splitlines() if line.startswith(" set_cruise_control ")]
    assert f"{150 - 10 + 1 - len(said)} of speed" in line
    run(*args, tmp_path / "b")
    for name in ("fc_train.json", "fc_test.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_synthesis_says_that_the_sentences_kept_for_test_ran_out(run, tmp_path):
    rooms = "|".join(f"room {letter}" for letter in "abcdefghij")
    sentences = [  # one of the four is kept for test, none of the three
        {"phrases": ["it is dark", "more light", "I see nothing", "lamp"]},
        {"phrases": [f"({rooms}) is dark", f"more light in ({rooms})", f"lamp in ({rooms})"]},
    ]
    function = {"name": "lamp_on", "description": "", "parameters": {}, "sentences": sentences}
    domain = {"carriers": ["{request}"], "functions": [function]}
    (tmp_path / "lamp.yaml").write_text(json.dumps(domain))
    args = ("synthesize", "--functions", tmp_path / "lamp.yaml", "--output", tmp_path / "data")
    code, out, _ = run(*args, "--num_examples", 30)
    assert code == 0
    assert f"{tmp_path / 'data' / 'fc_test.json'}: 1 examples\n2 fewer than asked" in out


def test_synthesis_touches_no_folder_that_holds_something(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = run("synthesize", "--output", tmp_path)
    assert code == 2
    assert f"{tmp_path}: exists and is not empty; name a new folder" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_doctor_exits_with_1_and_lists_every_place(run, tmp_path):
    write_rows(tmp_path, "train.json", *[("lock it", LOCK)] * 6)
    write_rows(tmp_path, "test.json", ("lock the car", LOCK))
    code, out, _ = run("doctor", "--data", tmp_path, "--all")
    assert code == 1
    assert [line for line in out.splitlines() if "repeated" in line] == [
        f"train.json: row {n}: repeated: 'lock it', as in row 0" for n in range(1, 6)
    ]
    code, out, _ = run("doctor", "--data", tmp_path)
    assert code == 1
    assert "and 2 more" in out


def test_doctor_finds_nothing_in_synthesized_examples(run, tmp_path):
    run("synthesize", "--num_examples", 4_000, "--output", tmp_path / "a")
    code, out, _ = run("doctor", "--data", tmp_path / "a", "--all")
    # Some of the 140 speeds of cruise control may not occur among so few.
    assert {line.split(": ")[2] for line in out.splitlines()} <= {"never in training"}
    assert code == bool(out)


def test_inspect_shows_the_row_of_a_folder_as_it_is_trained(run, tmp_path):
    area = FunctionCall("set_fan_speed", {"area": ["rear-left", "driver"], "speed": "low"})
    write_rows(tmp_path, "a_train.json", ("lock it", LOCK))
    write_rows(tmp_path, "b_train.json", ("lock the car", LOCK), ("fan low", area))
    code, out, _ = run("inspect", "--data", tmp_path, "--row", 2)
    assert code == 0
    assert out.splitlines()[:3] == [
        f"{tmp_path / 'b_train.json'}: row 1",
        "'fan low'",
        "set_fan_speed(speed='low', area=['driver', 'rear-left'])",
    ]
    trained = out.partition("tokens trained")[2]
    assert trained.index("driver") < trained.index("left")
    file_out = run("inspect", "--data", tmp_path / "b_train.json", "--row", 1)[1]
    assert file_out == out


def test_inspect_shows_a_row_that_cant_be_trained_and_says_why(run, tmp_path):
    rows = [vars(make_example("lock it", LOCK)) | {"assistant": "no"}, {"broken": 1}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    code, out, _ = run("inspect", "--data", tmp_path, "--row", 0)
    assert code == 0
    assert "no readable call in the response" in " ".join(out.split())
    assert "<|eop_token|>" in out
    code, _, err = run("inspect", "--data", tmp_path, "--row", 1)
    assert code == 2
    assert "train.json: row 1: needs exactly the keys" in err


@pytest.mark.parametrize("row", [-1, 1])
def test_inspect_says_which_row_is_the_last(run, tmp_path, row):
    write_rows(tmp_path, "test.json", ("lock it", LOCK))
    code, _, err = run("inspect", "--data", tmp_path, "--row", row, "--split", "test")
    assert (code, err) == (
        2,
        f"fc_lightning inspect: {tmp_path}: no row {row}; the last is row 0\n",
    )


# ---------------------------------------------------------------- a model in use


def test_calls_are_json_lines_in_the_order_of_the_commands(run, checkpoint):
    code, out, err = run("call", "--checkpoint", checkpoint, "lock the doors", "start")
    calls = [json.loads(line) for line in out.splitlines()]
    assert (code, err, len(calls)) == (0, "", 2)
    registry = load_registry()
    for found in calls:
        assert list(found) == ["name", "arguments", "is_complete", "missing", "confidence"]
        call = FunctionCall(found["name"], found["arguments"])
        assert registry.violations(call) == []
        assert (found["is_complete"], found["missing"]) == (call.is_complete, list(call.missing))
        assert 0 <= found["confidence"] <= 1


def test_a_command_that_cant_be_answered_leaves_the_others_answered(run, checkpoint):
    code, out, err = run("call", "--checkpoint", checkpoint, "", "lock", "a " * 5_000)
    first, second, third = (json.loads(line) for line in out.splitlines())
    assert (code, err) == (1, "")
    assert first == {"error": "the command is empty; say what should be done"}
    assert "name" in second
    assert third["error"].startswith("the command is too long")


def test_commands_are_read_from_a_pipe_one_a_line(run, checkpoint, monkeypatch):
    direct = run("call", "--checkpoint", checkpoint, "lock", "öffne")[1]
    feed(monkeypatch, "lock\r\nöffne".encode())
    assert run("call", "--checkpoint", checkpoint)[:2] == (0, direct)
    feed(monkeypatch, b"\n\xff\xfe lock\n")
    code, out, _ = run("call", "--checkpoint", checkpoint)
    assert code == 1
    assert [next(iter(json.loads(line))) for line in out.splitlines()] == ["error", "name"]


def test_an_answer_that_is_no_call_is_an_error(run, checkpoint):
    code, out, _ = run("call", "--checkpoint", checkpoint, "--unconstrained", "lock")
    assert code == 1
    assert list(json.loads(out)) == ["error"]


def test_in_a_conversation_calls_are_shown_and_errors_survived(run, checkpoint, monkeypatch):
    feed(monkeypatch, b"")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    commands = iter(["lock the doors", "", "start"])

    def say(prompt):
        if command := next(commands, None):
            return command
        if command is None:
            raise EOFError
        return command

    monkeypatch.setattr("builtins.input", say)
    code, out, _ = run("call", "--checkpoint", checkpoint)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "18 functions. Say what you want; Ctrl-D ends."
    assert sum(line.startswith("confidence ") and line.endswith(" ms") for line in lines) == 2
    assert "the command is empty; say what should be done" in lines


def test_evaluation_prints_tables_and_writes_its_files(run, checkpoint, tmp_path):
    write_rows(tmp_path, "test.json", ("lock it", LOCK), ("lock the car", LOCK))
    output = tmp_path / "report"
    code, out, _ = run(
        "evaluate", "--checkpoint", checkpoint, "--data", tmp_path, "--output", output
    )
    assert code == 0
    assert "· 2 complete requests" in out
    written = ["report.html", "report.json", "predictions.jsonl"]
    assert out.splitlines()[-3:] == [str(output / name) for name in written]
    assert all((output / name).is_file() for name in written)


def test_exports_say_what_they_wrote_and_warn_in_one_line(run, checkpoint, tmp_path):
    torch.manual_seed(0)
    tanh = GPT(GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=16, gelu="tanh"))
    source = save_hf(tanh, tmp_path / "source")
    code, out, err = run(
        "export", "--checkpoint", source, "--format", "nanogpt", "--output", tmp_path / "out"
    )
    assert (code, out) == (0, f"{tmp_path / 'out' / 'ckpt.pt'}\n")
    assert err.startswith(f"fc_lightning export: {tmp_path / 'out' / 'ckpt.pt'}: nanoGPT computes")
    assert err.count("\n") == 1
    written = load_gpt(tmp_path / "out")
    assert torch.equal(written.lm_head.weight, tanh.lm_head.weight)
    code, _, err = run(
        "export", "--checkpoint", source, "--format", "hf", "--output", tmp_path / "source"
    )
    assert code == 2
    assert "exists; remove it or name another output" in err


def test_benchmark_passes_its_options_on(run, monkeypatch):
    from fc_lightning import benchmark

    asked = []
    monkeypatch.setattr(
        benchmark, "benchmark_decode", lambda *args, **options: asked.append((args, options))
    )
    assert run("benchmark", "decode", "--shape", "tiny", "--seconds", "0.5")[0] == 0
    options = {"device": "auto", "num_commands": None, "seconds": 0.5}
    run("benchmark", "decode", "--seconds", "0.5")
    assert asked == [((("tiny",),), options), ((("20M", "gpt2"),), options)]


def test_benchmark_quality_passes_its_options_on(run, monkeypatch):
    from fc_lightning import benchmark_quality

    asked = []
    monkeypatch.setattr(
        benchmark_quality,
        "benchmark_quality",
        lambda data, **options: asked.append((data, options)),
    )
    given = {
        "pretrained_dir": "base",
        "shape": "tiny",
        "functions": "lamp.yaml",
        "device": "cpu",
        "batch_size": 3,
        "learning_rate": 3e-4,
        "muon_lr": 0.003,
        "num_steps": 7,
        "limit_s": 1.5,
        "loss": 0.1,
        "match": 0.7,
    }
    options = [f"--{name}={value}" for name, value in given.items()]
    assert run("benchmark", "quality", "--data", "my_data", *options)[0] == 0
    assert asked == [(Path("my_data"), given)]
