"""A run that was stopped, however, ends bit for bit as the run that never was."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from training import final_state, fit, is_same, read_lines, write_rows

from fc_lightning.callbacks import ValidateLastStep
from fc_lightning.checkpoint import CheckpointError
from fc_lightning.dataset import DataError
from fc_lightning.durability import AtomicCheckpointIO, SaveLast

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TRAINING = Path(__file__).with_name("training.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"), 19, 5)  # 5 batches of 4: the last has 3


class KeepEach(L.Callback):
    """Copies every last.ckpt, named by batches done and lines logged by then."""

    def on_train_batch_start(self, trainer, *_):
        self._keep(trainer)

    def on_train_end(self, trainer, *_):
        self._keep(trainer)

    def _keep(self, trainer):
        root = Path(trainer.default_root_dir)
        last = root / "checkpoints" / "last.ckpt"
        kept = root / "kept"
        kept.mkdir(exist_ok=True)
        newest = max(kept.iterdir(), key=lambda file: file.name, default=None)
        if last.exists() and (newest is None or newest.read_bytes() != last.read_bytes()):
            done = len(read_lines(root / "rows-0.jsonl"))
            shutil.copy(last, kept / f"{done:03}.ckpt")


def without_repeats(lines):
    return [json.loads(line) for line in dict.fromkeys(map(json.dumps, lines))]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_epochs": 2, "model": {"warmup_iters": 0}}, id="epochs"),
        pytest.param({"max_epochs": 2, "accumulate_grad_batches": 3}, id="short-last-window"),
        pytest.param(
            {"max_epochs": 2, "accumulate_grad_batches": 3, "val_check_interval": 2},
            id="validation-in-mid-window",
        ),
        pytest.param(
            {"max_steps": 7, "max_epochs": -1, "model": {"lr_decay_iters": 9}}, id="max-steps"
        ),
        pytest.param({"max_epochs": 2, "limit_train_batches": 3}, id="part-of-an-epoch"),
        pytest.param({"max_epochs": 2, "limit_val_batches": 0}, id="no-validation"),
        pytest.param({"max_epochs": 1, "num_workers": 2, "save_every": 3}, id="workers"),
        pytest.param({"max_epochs": 2, "batch_size": None, "max_tokens": 300}, id="tokens"),
    ],
)
def test_a_run_goes_on_from_any_of_its_checkpoints_as_if_never_stopped(tmp_path, data, options):
    options = {"save_every": 1} | options
    whole = fit(tmp_path / "whole", data, callbacks=[KeepEach()], **options)
    logged = read_lines(tmp_path / "whole" / "log.jsonl")
    rows = read_lines(tmp_path / "whole" / "rows-0.jsonl")
    kept = sorted((tmp_path / "whole" / "kept").iterdir())
    assert len(kept) >= 2
    for checkpoint in kept:
        root = tmp_path / checkpoint.stem
        resumed = fit(root, data, ckpt_path=str(checkpoint), **options)
        assert is_same(final_state(resumed), final_state(whole)), checkpoint.stem
        assert read_lines(root / "rows-0.jsonl") == rows[int(checkpoint.stem) :]
        again = read_lines(root / "log.jsonl")
        assert again == logged[len(logged) - len(again) :]


def test_a_run_that_came_to_its_end_goes_on_to_a_later_one(tmp_path, data):
    model = {"lr_decay_iters": 9}
    options = {"max_epochs": -1, "model": model, "val_check_interval": 2}
    whole = fit(tmp_path / "whole", data, max_steps=8, **options)
    for max_steps in (3, 3, 5, 5, 8):  # in mid-epoch, at an epoch's end, in the next; some twice
        part = fit(
            tmp_path / "parts",
            data,
            max_steps=max_steps,
            ckpt_path="last",
            callbacks=[ValidateLastStep()],
            **options,
        )
    assert is_same(final_state(part), final_state(whole))
    rows = [read_lines(tmp_path / run / "rows-0.jsonl") for run in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert part.current_epoch == whole.current_epoch


@pytest.mark.parametrize("max_steps", [3, 5])  # in mid-epoch, at an epoch's end
def test_last_knows_of_the_best_that_the_last_step_may_be(tmp_path, data, max_steps):
    options = {"max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    model = {"lr_decay_iters": 9}
    extra = {"callbacks": [ValidateLastStep()], "model": model, "max_steps": max_steps}
    fit(tmp_path, data, **options, **extra)
    last, best = (
        torch.load(tmp_path / "checkpoints" / name, weights_only=True)
        for name in ("last.ckpt", "best.ckpt")
    )
    assert best["global_step"] == max_steps
    states = [s for s in last["callbacks"].values() if "best_model_score" in s]
    (logged,) = [
        line["val/loss"]
        for line in read_lines(tmp_path / "log.jsonl")
        if line.get("val/loss") and line["step"] == max_steps
    ]
    assert [float(state["best_model_score"]) for state in states] == [logged]


def test_a_run_without_a_batch_leaves_what_it_went_on_from(tmp_path, data):
    options = {"max_epochs": 1, "accumulate_grad_batches": 3, "val_check_interval": 2}
    fit(tmp_path, data, **options)
    last = tmp_path / "checkpoints" / "last.ckpt"
    ranks = torch.load(last, weights_only=True)["ranks"]
    fit(tmp_path, data, ckpt_path="last", **options)
    assert is_same(torch.load(last, weights_only=True)["ranks"], ranks)
    stop = {"callbacks": [SignalAt(signal.SIGTERM, train=1)], "save_every": 99}
    with pytest.raises(SystemExit):  # in mid-window, with a validation to make up for
        fit(tmp_path / "stopped", data, **stop, **options)
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    ranks = torch.load(last, weights_only=True)["ranks"]
    assert "gradients" in ranks[0]
    stop["callbacks"] = [SignalAt(signal.SIGTERM, validation=1)]
    with pytest.raises(SystemExit):
        fit(tmp_path / "stopped", data, ckpt_path="last", **stop, **options)
    assert is_same(torch.load(last, weights_only=True)["ranks"], ranks)


class SignalAt(L.Callback):
    """Sends this process a signal in the n-th training or validation batch."""

    def __init__(self, number, *, train=None, validation=None):
        self.number, self.train, self.validation = number, train, validation

    def on_train_batch_start(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.train:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, *_):
        if not trainer.sanity_checking and trainer.fit_loop.total_batch_idx == self.validation:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "where"),
    [
        pytest.param(signal.SIGTERM, {"train": 0}, id="in-mid-window"),
        pytest.param(signal.SIGUSR1, {"train": 1}, id="before-a-validation"),
        pytest.param(signal.SIGINT, {"validation": 1}, id="in-a-validation"),
        pytest.param(signal.SIGTERM, {"train": 4}, id="at-the-end-of-an-epoch"),
    ],
)
def test_a_signal_saves_says_where_and_loses_nothing(tmp_path, data, capsys, number, where):
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "val_check_interval": 2}
    whole = fit(tmp_path / "whole", data, **options)
    handlers = [signal.getsignal(n) for n in SIGNALS]
    root = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stop:
        fit(root, data, save_every=99, callbacks=[SignalAt(number, **where)], **options)
    assert stop.value.code == 128 + number
    assert str(root / "checkpoints" / "last.ckpt") in capsys.readouterr().err
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    resumed = fit(root, data, save_every=99, ckpt_path="last", **options)
    assert is_same(final_state(resumed), final_state(whole))
    logged = read_lines(tmp_path / "whole" / "log.jsonl")
    assert without_repeats(read_lines(root / "log.jsonl")) == logged


def test_a_window_that_is_cut_short_leaves_nothing_to_the_next(tmp_path, data):
    options = {"max_epochs": 1, "limit_val_batches": 0}
    stop = {"callbacks": [SignalAt(signal.SIGTERM, train=1)], "accumulate_grad_batches": 3}
    with pytest.raises(SystemExit):
        fit(tmp_path / "stopped", data, **stop, **options)
    file = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    for name in ("gradients", "window_loss", "window_tokens"):
        del checkpoint["ranks"][0][name]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    options["accumulate_grad_batches"] = 2  # so the third batch begins a window, not ends one
    resumed = fit(tmp_path / "with", data, ckpt_path=str(file), **options)
    without = fit(tmp_path / "without", data, ckpt_path=str(tmp_path / "without.ckpt"), **options)
    assert is_same(final_state(resumed), final_state(without))


PORTS = itertools.count(20_000 + os.getpid() % 1_000 * 10)  # below those that systems hand out


@pytest.fixture
def start():
    """A function that starts a run in processes of its own, which end with the test."""
    started = []

    def start(root, data, env=None, **options):
        command = [sys.executable, str(TRAINING), str(root), str(data), json.dumps(options)]
        # Runs side by side, left to find a free port themselves, may find the same one.
        env = os.environ | {"MASTER_PORT": str(next(PORTS))} | (env or {})
        started.append(
            subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, env=env)
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_batches(root, process, number):
    file = root / "rows-0.jsonl"
    wait_until(lambda: process.poll() is not None or len(read_lines(file)) >= number)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_any_step_ends_as_the_one_that_was_not(tmp_path, data, start, ranks):
    options = {
        "max_epochs": 3,
        "accumulate_grad_batches": 2,
        "val_check_interval": 2,
        "batch_size": 4 // ranks,
        "devices": ranks,
        "strategy": "ddp" if ranks > 1 else "auto",
    }
    whole = start(tmp_path / "whole", data, **options)
    root = tmp_path / "killed"
    process = start(root, data, **options)
    wait_for_batches(root, process, random.randint(1, 14))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert start(root, data, ckpt_path="last", **options).wait(timeout=120) == 0
    assert whole.wait(timeout=120) == 0
    finals = [torch.load(tmp_path / run / "final.pt") for run in ("whole", "killed")]
    assert is_same(*finals)
    logs = [read_lines(tmp_path / run / "log.jsonl") for run in ("whole", "killed")]
    assert without_repeats(logs[1]) == logs[0]


def test_a_signal_to_one_rank_stops_all_of_them_together(tmp_path, data, start):
    options = {"max_epochs": 200, "devices": 2, "strategy": "ddp", "batch_size": 2}
    # Stands for a thread that outlives the interpreter: nothing that late may change the status.
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    process = start(tmp_path, data, env={"PYTHONPATH": str(tmp_path)}, **options)
    wait_for_batches(tmp_path, process, 3)
    process.send_signal(signal.SIGTERM)  # to rank 0 only
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert error.decode().count("stopped after step") == 1
    torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_kill_while_writing_leaves_a_readable_checkpoint(tmp_path):
    file = tmp_path / "last.ckpt"
    num_halves = 0
    for _ in range(20):
        before = file.stat().st_mtime_ns if file.exists() else 0
        if (pid := os.fork()) == 0:
            for i in range(10**9):
                content = {"i": i, "weights": torch.full((1_000_000,), i)}
                AtomicCheckpointIO().save_checkpoint(content, file)
        wait_until(lambda: file.exists() and file.stat().st_mtime_ns != before)  # noqa: B023
        time.sleep(random.random() / 50)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        num_halves += (tmp_path / ".last.ckpt.partial").exists()
        content = torch.load(file, weights_only=True)
        assert (content["weights"] == content["i"]).all()
    assert num_halves > 0  # some were killed in the middle


COMPILE_AFTER_A_SIGNAL = """
import os, signal
from torch._inductor.async_compile import AsyncCompile
from fc_lightning.durability import start_compile_workers

start_compile_workers()
worker = AsyncCompile.process_pool().submit(os.getpid).result(timeout=90)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: print(number))
    os.killpg(0, number)
print(AsyncCompile.process_pool().submit(os.getppid).result(timeout=90) != os.getppid())
os.kill(worker, 0)  # it lives
"""


def test_a_signal_to_all_processes_leaves_those_that_compile():
    code = [sys.executable, "-c", COMPILE_AFTER_A_SIGNAL]
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    done = subprocess.run(
        code, env=env, text=True, capture_output=True, timeout=120, start_new_session=True
    )
    assert done.stdout.split() == ["15", "10", "2", "True"], done.stderr
    assert done.returncode == 0, done.stderr


def test_a_second_signal_ends_a_run_at_once(tmp_path, data):
    class Stuck(L.Callback):
        def on_train_batch_start(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)

    pid = os.fork()
    if pid == 0:
        fit(tmp_path, data, max_epochs=1, callbacks=[Stuck()])
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_two_runs_of_a_seed_are_the_same_and_of_another_are_not(tmp_path, data):
    runs = [
        fit(tmp_path / str(i), data, seed=seed, max_epochs=1) for i, seed in enumerate([1, 1, 2])
    ]
    same, again, other = map(final_state, runs)
    assert is_same(same, again)
    assert not is_same(same["weights"], other["weights"])


def test_what_was_asked_for_wins_from_the_first_step_over_the_checkpoint(tmp_path, data):
    class Settings(L.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.seen.append(
                [(g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups]
            )

    first = {"learning_rate": 1e-3, "warmup_iters": 4, "lr_decay_iters": 20, "min_lr": 0.0}
    fit(tmp_path, data, max_steps=3, max_epochs=-1, model=first)
    asked = {"learning_rate": 3e-3, "weight_decay": 0.5, "beta1": 0.8, "beta2": 0.9}
    settings = Settings()
    fit(
        tmp_path,
        data,
        max_steps=5,
        max_epochs=-1,
        model=first | asked,
        ckpt_path="last",
        callbacks=[settings],
    )
    assert settings.seen == [
        [(3e-3 * share, 0.5, (0.8, 0.9)), (3e-3 * share, 0.0, (0.8, 0.9))] for share in (4 / 5, 1.0)
    ]


def test_going_on_in_mid_epoch_with_other_batches_is_refused_in_words(tmp_path, data):
    fit(tmp_path, data, max_steps=2, max_epochs=-1, model={"lr_decay_iters": 9})
    with pytest.raises(
        DataError, match="after 2 batches drawn with batch_size 4, but batch_size is 3"
    ):
        fit(tmp_path, data, max_epochs=1, batch_size=3, ckpt_path="last")
    tokens = {"batch_size": None, "max_tokens": 300}
    with pytest.raises(DataError, match="drawn with batch_size 4, but batch_size is None"):
        fit(tmp_path, data, max_epochs=1, ckpt_path="last", **tokens)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(tmp_path, data):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "code-was-run"),))

    torch.save({"state_dict": {}, "evil": Malicious()}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="code in a checkpoint is never run"):
        fit(tmp_path, data, max_epochs=1, ckpt_path=str(tmp_path / "bad.ckpt"))
    assert not (tmp_path / "code-was-run").exists()


def test_a_checkpoint_that_is_not_there_or_cut_short_is_refused_in_words(tmp_path):
    reader = AtomicCheckpointIO()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        reader.load_checkpoint(tmp_path / "none.ckpt")
    reader.save_checkpoint({"weights": torch.zeros(1000)}, tmp_path / "whole.ckpt")
    content = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        reader.load_checkpoint(tmp_path / "cut.ckpt")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    writer = AtomicCheckpointIO()
    writer.save_checkpoint({"i": 1}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="pickle"):
        writer.save_checkpoint({"i": lambda: 2}, tmp_path / "last.ckpt")
    assert writer.load_checkpoint(tmp_path / "last.ckpt") == {"i": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_last_is_written_every_so_many_steps(tmp_path, data):
    class Times(L.Callback):
        def __init__(self):
            self.steps = []

        def on_train_batch_start(self, trainer, *_):
            file = Path(trainer.default_root_dir, "checkpoints", "last.ckpt")
            self.steps.append(torch.load(file)["global_step"] if file.exists() else None)

    times = Times()
    fit(tmp_path, data, save_every=2, max_epochs=1, callbacks=[times])
    assert times.steps == [None, None, 2, 2, 4]
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, not 0"):
        SaveLast(0)
