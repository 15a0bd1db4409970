"""`fit` and `predict` from the command line, on a checkpoint of another run."""

import json
import os

import pytest
import torch
from training import write_rows

from fc_lightning import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that runs the command line on a folder with a checkpoint of two steps."""
    root = tmp_path_factory.mktemp("run")
    data = write_rows(root / "data", 16, 3)

    def run(command, **options):
        always = {
            "data.fc_data_dir": data,
            "data.batch_size": 4,
            "trainer.default_root_dir": root,
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.enable_progress_bar": "false",
            "trainer.limit_val_batches": 1,
        }
        cli.main([command, *(f"--{name}={value}" for name, value in (always | options).items())])
        return root

    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 192, "warmup_iters": 9}
    model = {f"model.{name}": value for name, value in shape.items()}
    run("fit", **model, **{"model.learning_rate": 1e-3, "trainer.max_steps": 2})
    return run


def last(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def test_what_is_said_wins_over_a_checkpoint_and_the_rest_stays(trained):
    said = {"model.learning_rate": 3e-3, "model.weight_decay": 0.5}
    root = trained("fit", ckpt_path="last", **said, **{"trainer.max_steps": 3})
    checkpoint = last(root)
    assert checkpoint["global_step"] == 3
    decayed = checkpoint["optimizer_states"][0]["param_groups"][0]
    assert (decayed["initial_lr"], decayed["weight_decay"]) == (3e-3, 0.5)
    assert decayed["lr"] == pytest.approx(3e-3 * 4 / 10)  # the checkpoint's 9 steps of warmup
    assert checkpoint["hyper_parameters"]["n_embd"] == 8


def test_a_shape_that_is_not_the_checkpoints_is_refused(trained):
    with pytest.raises(ValueError, match=r"model\.n_layer 3 is not that of .*last\.ckpt, 1;"):
        trained("fit", ckpt_path="last", **{"model.n_layer": 3})


def test_predict_writes_a_call_for_each_row(trained, capsys):
    root = trained("predict", ckpt_path="last")
    lines = [json.loads(line) for line in (root / "predictions.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert f"3 predictions are in {root}{os.sep}predictions.jsonl" in capsys.readouterr().out
