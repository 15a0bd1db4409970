"""What README says can be done, can be done: its commands and its Python run, in its order.

Every line of its shell blocks is taken as it stands; `shorter` only makes models, data and times
small. What README shows as files is written as README shows it.
"""

import json
import lzma
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from fc_lightning import FunctionCaller, IncompleteCall, commands, load_registry
from fc_lightning.__main__ import main
from fc_lightning.caller import UnknownHandler
from fc_lightning.calls import FunctionCall
from fc_lightning.chat import make_example
from fc_lightning.dataset import expected_call, read_rows
from fc_lightning.export import save_nanogpt
from fc_lightning.gpt import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

INSTALLING = {  # what .ci/run does, and what tests can't do inside themselves
    "python3 -m venv .venv",
    "python3 -m venv --clear .venv",
    ". .venv/bin/activate",
    "pip install .",
    'pip install -e ".[test]"',
    "python -m pytest",
}
TRAINER = (
    "--trainer.accelerator=cpu --trainer.precision=32-true --trainer.enable_progress_bar=false"
)
FIT = (
    " --trainer.max_epochs=2 --trainer.max_steps=4 --trainer.limit_train_batches=2"
    " --trainer.val_check_interval=1.0 --trainer.check_val_every_n_epoch=1"
    " --model.compile=false --model.block_size=256"
)
CALLS = " --calls.num_examples=2 --calls.num_final_examples=2 --samples.num_samples=1"
TEXT = " --model.n_layer=1 --model.n_head=1 --model.n_embd=8 --data.batch_size=1"


def shorter(command: str) -> str:
    """Options that make a command short, to stand behind its own."""
    name = " ".join(w for w in command.split()[:2] if not w.startswith("-"))
    first = name.split()[0]
    if first in TRAINER_COMMANDS:
        options = TRAINER
        if first == "fit":
            options += FIT + (TEXT if "pretrain" in command else CALLS)
            if "--model.pretrained_dir" not in command and "pretrain.yaml" not in command:
                options += " --model.pretrained_dir=my_nanogpt_out"
        if "--data.fc_data_dir" not in command and "pretrain.yaml" not in command:
            options += " --data.num_examples=200"
        return options
    return {
        "synthesize": "--num_examples=200",
        "benchmark train": "--shape=tiny --seconds=0.01 --batch_size=2",
        "benchmark quality": "--shape=tiny --batch_size=1 --num_steps=1 --limit_s=0.01",
        "benchmark decode": "--shape=tiny --seconds=0.01 --num_commands=2",
    }.get(name, "")


def parts() -> list[str]:
    """The commands of README's shell blocks, in order, without comments."""
    found = []
    for kind, block in FENCES:
        if kind == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                found += [shlex.join(shlex.split(c, comments=True)) for c in line.split(" && ")]
    return [command for command in found if command]


@pytest.fixture
def newcomer(tmp_path, monkeypatch):
    """The folder of a clone, with the checkpoint and the texts that README takes for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FC_LIGHTNING_CACHE", str(tmp_path / "cache"))
    os.symlink(ROOT / "configs", "configs")
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=1024))
    save_nanogpt(model, Path("my_nanogpt_out"))
    Path("corpus").mkdir()
    for name in ("assistant", "docs", "prose", "val"):
        with lzma.open(f"corpus/{name}.txt.xz", "wt") as file:
            file.write("\n<|endoftext|>\n".join(f"The lamp is on at {n}." * 9 for n in range(99)))
    [lamp] = [block for kind, block in FENCES if kind == "yaml" and block.startswith("# lamp.yaml")]
    Path("lamp.yaml").write_text(lamp, encoding="utf-8")
    return tmp_path


def test_every_command_runs_in_order(newcomer, capsys):
    installing = {shlex.join(shlex.split(command)) for command in INSTALLING}
    ran = set()
    for command in parts():
        if command in installing:
            continue
        assert command.startswith("python -m fc_lightning "), command
        command = command.removeprefix("python -m fc_lightning ")
        code = 0
        try:
            main(shlex.split(f"{command} {shorter(command)}"))
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        # So few examples don't hold every call, which doctor must say.
        may_complain = command == "doctor --data my_data" and "never in training" in said.out
        assert code == 0 or may_complain, f"{command}\n{said.out[-2000:]}\n{said.err[-2000:]}"
        ran |= {command.split()[0], " ".join(command.split()[:2])}
    assert [n for n in (*TRAINER_COMMANDS, *commands.COMMANDS) if n not in ran] == []
    assert Path("report", "report.html").is_file()
    run_python()


def run_python():
    """README's Python, on the checkpoint that its commands left; untrained, it may ask back."""
    [python] = [block for kind, block in FENCES if kind == "python"]
    scope = {}
    try:
        exec(python, scope)
    except (IncompleteCall, UnknownHandler):
        assert python.splitlines()[-1].startswith("caller.execute(")
    assert isinstance(scope["caller"], FunctionCaller)
    assert scope["call"].function in load_registry().by_name


def test_the_example_of_a_data_file_is_one(tmp_path):
    [text] = [block for kind, block in FENCES if kind == "json" and block.startswith("[")]
    (tmp_path / "train.json").write_text(text, encoding="utf-8")
    [row] = read_rows(tmp_path, "train")
    call = expected_call(row, load_registry())
    assert vars(make_example(row.example.command, call)) == json.loads(text)[0]


def test_the_answer_shown_is_a_valid_call():
    [text] = [block for kind, block in FENCES if kind == "json" and block.startswith("{")]
    answer = json.loads(text)
    call = FunctionCall(answer["name"], answer["arguments"])
    assert load_registry().violations(call) == []
    assert (answer["is_complete"], answer["missing"]) == (call.is_complete, list(call.missing))


def test_links_and_files_named_in_readme_exist():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= set(re.findall(r"(?:configs|notebooks|tests)/\w+\.(?:yaml|ipynb|py)", README))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
