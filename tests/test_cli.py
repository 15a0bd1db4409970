"""`fit` and `predict` from the command line: going on from a checkpoint, and in two processes."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from training import is_same, write_rows

from fc_lightning import cli


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), 16, 3)


MODEL = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 192, "warmup_iters": 9}


def arguments(command, data, root, **options):
    """Those of a command that trains a tiny model, or uses a trained one."""
    always = {
        "data.fc_data_dir": data,
        "data.batch_size": 4,
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.limit_val_batches": 1,
        "trainer.max_epochs": 9,  # as in our configs: Lightning asks for a loader to count steps
    }
    if command == "fit" and "ckpt_path" not in options:
        always |= {f"model.{name}": value for name, value in MODEL.items()}
        always |= {"model.learning_rate": 1e-3}
    return [command, *(f"--{name}={value}" for name, value in (always | options).items())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A function that runs the command line on a folder with a checkpoint of two steps."""
    root = tmp_path_factory.mktemp("run")

    def run(command, **options):
        cli.main(arguments(command, data, root, **options))
        return root

    run("fit", **{"trainer.max_steps": 2})
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


@pytest.mark.parametrize("max_steps", [2, 4, 5])  # in mid-epoch, at an epoch's end, in the next
def test_a_run_goes_on_as_if_it_had_not_ended(tmp_path, data, max_steps):
    ends = []
    for name, stops in (("whole", [7]), ("parts", [max_steps, 7])):
        for steps in stops:
            options = {} if steps == stops[0] else {"ckpt_path": "last"}
            options |= {"trainer.max_steps": steps, "model.lr_decay_iters": 20}
            cli.main(arguments("fit", data, tmp_path / name, **options))
        ends.append(last(tmp_path / name))
    assert ends[0]["global_step"] == ends[1]["global_step"] == 7
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert is_same(ends[0][part], ends[1][part])


def run_apart(command, data, root, **options):
    """Run the command line in a process of its own, which starts the others; returns its output."""
    line = [sys.executable, "-m", "fc_lightning", *arguments(command, data, root, **options)]
    done = subprocess.run(line, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_same_weights(*roots):
    states = [last(root)["state_dict"] for root in roots]
    one, two = (torch.cat([weights.flatten() for weights in s.values()]).double() for s in states)
    assert float((one - two).norm() / one.norm()) < 1e-6  # fp32 sums in another order


def test_two_processes_train_and_predict_as_one(tmp_path, data):
    options = {"trainer.max_steps": 5, "model.dropout": 0.0}
    cli.main(arguments("fit", data, tmp_path / "one", **options))
    shared = {"trainer.devices": 2, "data.batch_size": 2}
    said = run_apart("fit", data, tmp_path / "two", **options, **shared)
    assert said.count("16 rows for training, 3 for validation\n5 steps on cpu x 2") == 1
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    said = run_apart("predict", data, tmp_path / "two", ckpt_path="last", **shared)
    assert said.count("3 predictions are in") == 1


def run_two_on_one_gpu(data, root, **options):
    """Two ranks of `fit`, as if each were a machine with one GPU; NCCL would want two of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy"}
    strategy |= {"init_args": {"process_group_backend": "gloo"}}
    options |= {"trainer.num_nodes": 2, "trainer.strategy": json.dumps(strategy)}
    line = [sys.executable, "-m", "fc_lightning", *arguments("fit", data, root, **options)]
    meet = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [subprocess.Popen(line, env=meet | {"NODE_RANK": str(rank)}) for rank in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_on_a_gpu_train_as_one_with_a_larger_batch(tmp_path):
    data = write_rows(tmp_path / "data", 640, 3)
    options = {"trainer.accelerator": "gpu", "trainer.max_steps": 12, "trainer.max_epochs": 99}
    options |= {"model.n_layer": 6, "model.n_head": 6, "model.n_embd": 384, "model.dropout": 0.0}
    options |= {"model.compile": "true", "trainer.limit_val_batches": 0, "trainer.devices": 1}
    run_apart("fit", data, tmp_path / "one", **options, **{"data.batch_size": 128})
    run_two_on_one_gpu(data, tmp_path / "two", **options, **{"data.batch_size": 64})
    accumulated = {"data.batch_size": 32, "trainer.accumulate_grad_batches": 2}
    run_two_on_one_gpu(data, tmp_path / "four", **options, **accumulated)
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "four")
