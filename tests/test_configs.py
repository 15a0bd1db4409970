"""Every config under configs/ parses, knows only real keys, and runs for a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fc_lightning.__main__ import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

TINY = [
    "--model.n_layer=1",
    "--model.n_head=2",
    "--model.n_embd=16",
    "--model.block_size=256",
    "--model.compile=false",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
CALLS = [
    "--model.pretrained_dir=null",
    "--data.num_examples=200",
    "--data.batch_size=8",
    "--trainer.val_check_interval=2",
    "--samples.sample_interval=2",
    "--calls.num_examples=2",
]


def run(*args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "FC_LIGHTNING_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "fc_lightning", *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """A function like `run`, but in this process; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_here(*args):
        with pytest.raises(SystemExit) as end:  # of a traceback the test fails
            main(list(args))
        return end.value.code, *capsys.readouterr()

    return run_here


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_for_a_few_steps(config, tmp_path):
    data = CALLS
    if config.stem == "pretrain":
        documents = "\n<|endoftext|>\n".join(
            f"The lamp is on at {n}. It is dark." for n in range(99)
        )
        (tmp_path / "words.txt").write_text(documents, encoding="utf-8")
        data = [
            "--data.text_files={words.txt: 1}",
            "--data.val_files=[words.txt]",
            "--data.batch_size=2",
            "--model.block_size=32",
            "--trainer.val_check_interval=2",
        ]
    result = run("fit", "--config", str(config), *TINY, *data, folder=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert list(tmp_path.glob("outputs/**/best.ckpt")), result.stdout
    assert "best checkpoint" in result.stdout


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_prints_whole(config, run_here):
    status, printed, _ = run_here("fit", "--config", str(config), "--print_config")
    assert status == 0
    data_key = "text_files:" if config.stem == "pretrain" else "fc_data_dir:"
    assert "learning_rate:" in printed and data_key in printed


def test_the_last_step_is_validated_and_can_be_the_best(tmp_path):
    steps = ["--model.learning_rate=1e-3", "--trainer.max_steps=5"]
    result = run("fit", *TINY, *CALLS, *steps, folder=tmp_path)  # validates every two steps
    assert result.returncode == 0, result.stderr[-2000:]
    best = torch.load(tmp_path / "outputs/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 5


def test_a_typo_in_a_config_names_file_key_and_the_nearest(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("model:\n  learning_rat: 1.0e-3\n", encoding="utf-8")
    result = run("fit", "--config", str(config), folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        f"fc_lightning fit: config {config}: no key 'model.learning_rat'; "
        "the nearest is model.learning_rate"
    )
    assert "Traceback" not in result.stderr


def test_a_typo_in_an_option_is_no_abbreviation(run_here):
    status, _, errors = run_here("fit", "--trainer.max_epoch=3")
    assert status == 2
    assert "no option --trainer.max_epoch; the nearest is --trainer.max_epochs" in errors


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.fc_data_dir=nowhere", "nowhere: no such folder"),
        ("--model.pretrained_dir=nowhere", "nowhere: no such file or folder"),
        ("--model.learning_rate=fast", "model.learning_rate"),
        ("--data.batch_size=0", "batch_size must be at least 1, not 0"),
        ("--model.learning_rate=0", "learning_rate must be above 0, not 0.0"),
        ("--data.functions=nowhere.yaml", "nowhere.yaml: can't be read"),
    ],
)
def test_bad_input_ends_in_words(option, words, run_here, tmp_path):
    status, _, errors = run_here("fit", option)
    assert status == 2
    assert words in errors
    assert not (tmp_path / "outputs").exists()
