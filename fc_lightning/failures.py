"""Failures of training in words: which step, which rows of which file, and what to try."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from fc_lightning.dataset import Batch
from fc_lightning.ranks import gather


class NonFiniteError(ValueError):
    """A loss or a gradient that is NaN or infinite; the message says where and what to try."""


class _Check(NamedTuple):
    """A number that must be finite; whether it is, the device knows before the host asks."""

    what: str
    step: int
    rows: list[int]
    is_finite: Tensor  # ()


class ExplainFailures(L.Callback):
    """Ends a run at a loss or gradient that isn't finite, and says what ran out of memory.

    Numbers are checked on the device; the host asks every `log_every_n_steps` batches, before
    each checkpoint (so none holds spoilt weights) and before a validation, and still names the
    first step and rows. With fp16 an infinite gradient is no failure: the scaler skips that step.
    """

    def __init__(self) -> None:
        self._checks: list[_Check] = []
        self._window_rows: list[int] = []
        self._batch: Batch | None = None
        self._batch_is_trained = True

    # ---------------------------------------------------------------- numbers

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._checks, self._window_rows = [], []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._batch, self._batch_is_trained = batch, True
        self._window_rows += batch.rows

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        assert self._batch is not None
        self._check(trainer, "loss", self._batch.rows, loss.detach())

    def on_before_optimizer_step(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            largest = torch.nn.utils.get_total_norm(gradients, norm_type=float("inf"))
            self._check(trainer, "gradient", self._window_rows, largest)
        self._window_rows = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (trainer.fit_loop.total_batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0:
            self._stop_if_not_finite(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_not_finite(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        self._stop_if_not_finite(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_not_finite(trainer)

    def _check(self, trainer: L.Trainer, what: str, rows: list[int], value: Tensor) -> None:
        step = trainer.global_step + 1
        self._checks.append(_Check(what, step, rows, torch.isfinite(value)))

    def _stop_if_not_finite(self, trainer: L.Trainer) -> None:
        checks, self._checks = self._checks, []
        if not checks:
            return
        is_finite = torch.stack([check.is_finite for check in checks])
        if trainer.world_size > 1:
            is_finite = trainer.strategy.reduce(is_finite.to(torch.int32), reduce_op="min").bool()
        if is_finite.all():
            return
        # The first one, and of that the rows of every rank that has it: DDP spreads a gradient.
        first = checks[int(is_finite.int().argmin())]
        guilty = [] if bool(first.is_finite) else first.rows
        rows = [row for rows in gather(guilty) for row in rows]
        raise NonFiniteError(
            f"step {first.step:,}: the {first.what} is not finite in {_where(trainer, rows)}. "
            "Lower model.learning_rate or lengthen model.warmup_iters; with trainer.precision "
            "16-mixed try bf16-mixed or 32-true; and look at those rows. To go on from before it: "
            "--ckpt_path last"
        )

    # ---------------------------------------------------------------- memory

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any
    ) -> None:
        self._batch, self._batch_is_trained = batch, False

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._batch is not None and is_out_of_memory(exception):
            exception.add_note(self._memory_advice(trainer, self._batch))

    def _memory_advice(self, trainer: L.Trainer, batch: Batch) -> str:
        num_tokens = max(batch.lengths)
        longest = batch.rows[batch.lengths.index(num_tokens)]
        where = _where(trainer, [longest], "train_set" if self._batch_is_trained else "val_set")
        limit = "max_tokens" if getattr(trainer.datamodule, "max_tokens", None) else "batch_size"
        return (
            f"out of memory with {len(batch.rows)} rows in a batch, the longest of "
            f"{num_tokens + len(batch.prefix)} tokens ({where}). Lower data.{limit} (and raise "
            "trainer.accumulate_grad_batches by as much: the steps stay the same), or "
            "data.block_size, which leaves longer rows out"
        )


def is_out_of_memory(exception: BaseException) -> bool:
    is_host_memory = isinstance(exception, RuntimeError) and "can't allocate" in str(exception)
    return isinstance(exception, torch.OutOfMemoryError) or is_host_memory


def _where(trainer: L.Trainer, rows: Iterable[int], dataset: str = "train_set") -> str:
    """Rows of the data's files, in few words: "train.json: rows 3, 17-19"."""
    known = getattr(getattr(trainer.datamodule, dataset, None), "rows", None)
    by_file: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        file, number = (str(known[row].file), known[row].number) if known else ("data", row)
        by_file[file].append(number)
    return "; ".join(f"{file}: rows {_ranges(numbers)}" for file, numbers in by_file.items())


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, runs of them shortened: [3, 19, 17, 18] is "3, 17-19"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
