"""What keeps a run from being lost: whole checkpoints, a newest one to go on from, and signals.

`fit --ckpt_path last` goes on from `last.ckpt` bit for bit as if nothing had happened. What stands
in a checkpoint is module.py's business, and which rows come next loader.py's.
"""

from __future__ import annotations

import atexit
import copy
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from fc_lightning.checkpoint import CheckpointError, load_plain
from fc_lightning.dataset import Batch
from fc_lightning.ranks import highest_of_ranks

_NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]  # Windows has two


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there, and that are read without running code in them.

    A checkpoint is written beside its place and then takes it in one step: killed at any moment,
    the one before stays readable.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if "://" in str(path):  # an object store knows whole objects only
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return None

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read tensors and plain values, onto the CPU.

        Raises:
            CheckpointError: no such file, a damaged one, or one with code in it.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: no such checkpoint")
        # Not mapped: a file that is overwritten in place must not change a running optimizer.
        return dict(load_plain(Path(path), is_mapped=False))


class SaveLast(Checkpoint):
    """Keeps `last.ckpt` fresh, and writes it when a signal asks the run to end.

    It is written every so often, after each validation and epoch, and at the end. SIGTERM,
    SIGUSR1 (what schedulers send before they take a machine away) and Ctrl-C write it at the next
    batch boundary and end the run with exit status 128 + signal; the same signal again ends it at
    once. Under DDP a signal to one rank stops all of them together.

    Args:
        every_n_steps: optimizer steps from one writing to the next.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._signal = 0
        self._signalled_at = 0.0
        self._handlers: dict[int, Any] = {}
        self._owes_validation = self._is_in_batch_end = self._is_in_epoch_end = False
        self._unlogged: dict[str, Any] | None = None
        self._saved_at: int | None = None  # batches done
        self._loops: dict[str, Any] = {}  # as saved then
        self._is_saving = self._is_saving_again = False

    # ---------------------------------------------------------------- when to write

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self._is_in_batch_end = True
        if _is_validation_next(trainer):
            # Written after it; but a signal doesn't wait for a validation: it is made up for.
            self._stop_if_asked(trainer, owes_validation=True)
        elif not _is_epoch_over(trainer):
            is_step_done = not trainer.fit_loop._should_accumulate()
            is_last = trainer.global_step == trainer.max_steps or trainer.should_stop
            if is_step_done and (is_last or trainer.global_step % self.every_n_steps == 0):
                self._save(trainer)
            self._stop_if_asked(trainer)
        self._is_in_batch_end = False

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if _is_validating_in_fit(trainer):
            self._stop_if_asked(trainer, owes_validation=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.fit_loop.total_batch_idx + 1 == self._saved_at:
            # One more than was due, after the last step: the best checkpoint may be another now.
            self._is_saving_again = True
            trainer.save_checkpoint(self.path(trainer), weights_only=False)
            self._is_saving_again = False
        elif not _is_epoch_over(trainer):
            self._save(trainer)
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _is_epoch_over(trainer):  # and not cut short by max_steps
            self._is_in_epoch_end = True
            self._save(trainer)
            self._stop_if_asked(trainer)
            self._is_in_epoch_end = False

    # ---------------------------------------------------------------- writing

    def path(self, trainer: L.Trainer) -> Path:
        """`last.ckpt`, beside the best checkpoint, where `ckpt_path="last"` looks for it."""
        folders = (
            c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)
        )
        return Path(next(folders, None) or trainer.default_root_dir) / "last.ckpt"

    def _save(self, trainer: L.Trainer, *, owes_validation: bool = False) -> None:
        if trainer.fast_dev_run:
            return
        num_batches = trainer.fit_loop.total_batch_idx + 1
        if num_batches == self._saved_at:
            return
        self._owes_validation, self._is_saving = owes_validation, True
        trainer.save_checkpoint(self.path(trainer), weights_only=False)
        self._owes_validation, self._is_saving, self._saved_at = False, False, num_batches

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._is_saving_again:
            checkpoint["loops"] = self._loops  # they have moved on to the run's end
            return
        fit_loop = checkpoint["loops"]["fit_loop"]
        if self._owes_validation:
            _mark_validation_as_due(fit_loop)
        if self._is_in_epoch_end:
            _mark_epoch_as_open(fit_loop, trainer)
        if self._is_in_batch_end and not trainer.fit_loop._should_accumulate():
            # Lightning logs a step after these hooks: should the run end here, the next one does.
            checkpoint["unlogged"] = _step_metrics(trainer)
        if self._is_saving:
            self._loops = copy.deepcopy(checkpoint["loops"])

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._unlogged = checkpoint.get("unlogged")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._unlogged:
            for logger in trainer.loggers:
                logger.log_metrics(**self._unlogged)
        self._unlogged = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if _is_validating_in_fit(trainer):
            # What `_mark_validation_as_due` wrote has done its work.
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()

    # ---------------------------------------------------------------- signals

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()  # nothing is compiled for a validation

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # If a callback has asked for the run's length before, Lightning has made the loader then,
        # without its state; it must not begin the epoch anew.
        trainer.fit_loop._load_combined_loader_states()
        self._listen()
        if pl_module.hparams.get("compile"):
            start_compile_workers()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_listening()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop_listening()

    def _listen(self) -> None:
        """Take the signals over from Lightning, whose SIGTERM handler writes nothing."""
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        self._signal = 0
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, self._notice)

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass on what the terminal has sent already: an echo is no second signal.
        if self._signal and time.monotonic() - self._signalled_at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = self._signal or number
        self._signalled_at = time.monotonic()
        _say(
            f"{signal.Signals(number).name}: saving at the end of this batch; again to quit at once"
        )

    def _stop_if_asked(self, trainer: L.Trainer, *, owes_validation: bool = False) -> None:
        number = highest_of_ranks(self._signal)
        if not number:
            return
        self._save(trainer, owes_validation=owes_validation)
        if trainer.is_global_zero:
            _say(
                f"{signal.Signals(number).name}: stopped after step {trainer.global_step:,}, "
                f"saved to {self.path(trainer)}; the same command with --ckpt_path last goes on "
                "from there"
            )
        # Lightning's launcher kills rank 0 when another rank ends with a status.
        status = 128 + number if trainer.is_global_zero else 0
        if trainer.world_size > 1:
            global _owed_status
            _owed_status = status
        sys.exit(status)


def start_compile_workers() -> None:
    """Start the processes in which torch.compile has kernels compiled, deaf to signals.

    A signal to all of a run's processes would end them too, and torch would wait for them for ever.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return  # Windows, where a signal is for one process
    from torch._inductor.async_compile import AsyncCompile  # takes a second

    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # which processes inherit
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_owed_status: int | None = None


@atexit.register  # at import, so before those of process groups and loggers: it runs after them
def _end_as_said() -> None:
    """End a stopped rank with its status, whatever else the process still holds.

    A process group's threads can outlive the interpreter and abort the process (seen once in
    some 200 stopped runs): a scheduler would then take a run that was saved for one that crashed.
    """
    if _owed_status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_owed_status)


def _say(line: str) -> None:
    print(f"\n{line}", file=sys.stderr, flush=True)


def _is_validating_in_fit(trainer: L.Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking


def _is_epoch_over(trainer: L.Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def _is_validation_next(trainer: L.Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def _step_metrics(trainer: L.Trainer) -> dict[str, Any] | None:
    """What Lightning is about to log for the step just done, if anything."""
    connector = trainer._logger_connector
    if not connector.should_update_logs:
        return None
    metrics = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"step": int(metrics.pop("step")), "metrics": metrics}


def _mark_validation_as_due(fit_loop: dict[str, Any]) -> None:
    """Let a run that goes on from this state begin with the validation after its last batch.

    Lightning would skip it: it takes a checkpoint at the end of a training batch for one made by
    the validation that follows. So the batch is marked as completed, its validation as begun.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    for progress in (batches["total"], batches["current"]):
        progress["completed"] = progress["ready"]
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    validation["current"].update(ready=0, started=0, processed=0, completed=0)
    validation["total"].update(ready=1, started=1, processed=0, completed=0)


def _mark_epoch_as_open(fit_loop: dict[str, Any], trainer: L.Trainer) -> None:
    """Let a run that goes on from this state, written at an epoch's end, begin with that end.

    A run that is limited by max_steps would count the epoch a second time otherwise.
    """
    for progress in (fit_loop["epoch_progress"]["total"], fit_loop["epoch_progress"]["current"]):
        progress["processed"] -= 1
    if _is_validation_next(trainer):  # it has been; to pass over it, Lightning counts a step
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for loader in fit_loop["state_dict"]["combined_loader"]:
        loader["num_yielded"] = len(trainer.train_dataloader)  # whatever limit_train_batches was
