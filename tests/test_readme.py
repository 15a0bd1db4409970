"""What README says can be done, can be done: its commands parse, its smaller ones run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fc_lightning import commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(
    {
        " ".join(line.split())
        for block in BLOCKS
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("python -m fc_lightning")
    }
)
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def run(arguments: list[str], folder: Path, **options) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "FC_LIGHTNING_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "fc_lightning", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, **options
    )


def test_readme_shows_every_command():
    shown = {tuple(command.split()[3:5]) for command in COMMANDS}
    names = {first for first, _ in shown} | {" ".join(words) for words in shown}
    missing = [n for n in (*TRAINER_COMMANDS, *commands.COMMANDS) if n not in names]
    assert missing == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[3] in TRAINER_COMMANDS])
def test_trainer_command_parses(command, tmp_path):
    os.symlink(ROOT / "configs", tmp_path / "configs")
    result = run([*shlex.split(command, comments=True)[3:], "--print_config"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trainer:" in result.stdout


def test_the_story_of_a_domain_of_your_own(tmp_path):
    """README's YAML file, used as README says: synthesize, doctor, inspect, fit, call, export."""
    [yaml] = re.findall(r"```yaml\n(# lamp.yaml.*?)```", README, re.DOTALL)
    (tmp_path / "lamp.yaml").write_text(yaml, encoding="utf-8")
    steps = [
        "synthesize --output lamp_data --num_examples 400 --functions lamp.yaml",
        "doctor --data lamp_data --functions lamp.yaml",
        "inspect --data lamp_data --row 0 --functions lamp.yaml",
        "fit --data.fc_data_dir lamp_data --data.functions lamp.yaml --model.n_layer 1"
        " --model.n_head 2 --model.n_embd 16 --model.block_size 256 --trainer.max_steps 2"
        " --trainer.val_check_interval 1 --trainer.accelerator cpu",
        'call --checkpoint outputs/checkpoints/best.ckpt "light in the hall please"',
        "evaluate --checkpoint outputs/checkpoints/best.ckpt --data lamp_data --output report",
        "export --checkpoint outputs/checkpoints/best.ckpt --format nanogpt --output ckpt.pt",
    ]
    for step in steps:
        result = run(shlex.split(step), tmp_path)
        assert result.returncode == 0, f"{step}\n{result.stdout}\n{result.stderr}"
    assert (tmp_path / "report" / "report.html").is_file()


def test_links_and_files_named_in_readme_exist():
    named = set(re.findall(r"\]\((?!http)([^)#]+)\)", README))
    named |= set(re.findall(r"configs/\w+\.yaml|notebooks/\w+\.ipynb", README))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
