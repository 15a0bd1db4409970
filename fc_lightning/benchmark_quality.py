"""How soon training is good: the tutorial's recipe and this package's, from the same weights.

Both are measured in one run, on the same rows. The clock runs while weights are trained; what
compiling takes is told apart, and evaluating counts nowhere. The tutorial's recipe would need an
hour: its steps are taken in this package's way, which has the same gradients (but for dropout,
which it draws once a step and not eight times), and each counts for as long as the gradient of a
step of the tutorial's loop was measured to take.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fc_lightning.benchmark import SHAPES, use_device
from fc_lightning.caller import computes_in_bfloat16
from fc_lightning.datamodule import GPT2_BLOCK_SIZE, FunctionCallDataModule
from fc_lightning.module import FunctionCallModule
from fc_lightning.predictions import predict_rows
from fc_lightning.steps import NUM_REPEATS, Way, endless_steps, free_memory, warm_up

# Training between two evaluations: a share of all training before, and at least so long.
_GROWTH, _SHORTEST_S = 0.2, 0.25


@dataclass(frozen=True)
class Recipe:
    """A way to take steps, and the hyperparameters in which recipes differ."""

    way: Way  # whose time a step takes
    muon_lr: float | None  # without one, AdamW for all weights
    learning_rate: float
    min_lr: float
    warmup_iters: int
    lr_decay_iters: int
    dropout: float


# configs/finetune.yaml has the same; there, each step's rows go through the network once.
REFERENCE = Recipe(
    "reference", None, 5e-6, 1e-6, warmup_iters=2000, lr_decay_iters=54000, dropout=0.2
)


@dataclass(frozen=True)
class Quality:
    """What one recipe reached; seconds of its own clock, None where the limit came first."""

    way: Way
    warm_up_s: float
    num_steps: int
    trained_s: float  # all its steps
    loss_s: float | None  # until the validation loss was low enough
    match_s: float | None  # until enough validation calls were right
    lowest_loss: float
    highest_match: float


def benchmark_quality(
    data: Path,
    *,
    pretrained_dir: str | None = None,
    shape: str = "gpt2",
    functions: str | None = None,
    device: str = "auto",
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    muon_lr: float = 0.02,
    num_steps: int = 1000,
    limit_s: float = 120.0,
    loss: float = 0.02,
    match: float = 0.9,
    console: Console | None = None,
) -> list[Quality]:
    """Train on `data` by both recipes until `loss` and `match`, or `limit_s` each; print a table.

    Weights are those of `pretrained_dir`, else random ones of `shape`. Our recipe takes
    `learning_rate` for embeddings and norms and `muon_lr` for the rest, decayed over `num_steps`.
    Call match is measured on up to 256 rows.

    Raises:
        ValueError: an unknown shape or device, data that can't be used, fewer rows than a batch, a
            batch without rows or too large for a GPU's memory, or no time at all.
    """
    if pretrained_dir is None and shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; choose from {', '.join(SHAPES)}")
    for name, value in (("limit_s", limit_s), ("num_steps", num_steps)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
    where = use_device(device)
    console = console or Console()
    ours = Recipe("ours", muon_lr, learning_rate, learning_rate / 100, 20, num_steps, dropout=0.0)
    reached = []
    for recipe in (REFERENCE, ours):
        module = _module(recipe, pretrained_dir, shape, where)
        rows = FunctionCallDataModule(
            str(data),
            functions=functions,
            block_size=module.block_size,
            pad_to_multiple_of=16 if module.hparams.compile else 1,
        )
        rows.setup("fit")
        run = _Run(module, rows, recipe, batch_size)
        try:
            reached.append(run.until(loss=loss, match=match, limit_s=limit_s, console=console))
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory; lower batch_size {batch_size}") from error
        del module, run
        free_memory()
    console.print(_table(reached, loss=loss, match=match))
    return reached


def _module(
    recipe: Recipe, pretrained_dir: str | None, shape: str, device: torch.device
) -> FunctionCallModule:
    torch.manual_seed(0)
    s = SHAPES[shape]
    module = FunctionCallModule(
        pretrained_dir,
        optimizer="muon" if recipe.muon_lr else "adamw",
        muon_lr=recipe.muon_lr or 0.0,
        learning_rate=recipe.learning_rate,
        min_lr=recipe.min_lr,
        warmup_iters=recipe.warmup_iters,
        lr_decay_iters=recipe.lr_decay_iters,
        dropout=recipe.dropout,
        compile=device.type == "cuda",
        n_layer=s.n_layer,
        n_head=s.n_head,
        n_embd=s.n_embd,
        block_size=None if pretrained_dir else GPT2_BLOCK_SIZE,
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # It only says which precision is computed in.
    module.trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if computes_in_bfloat16(device) else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    return module.to(device)


class _Run:
    """One recipe's training, a stretch at a time."""

    def __init__(
        self,
        module: FunctionCallModule,
        data: FunctionCallDataModule,
        recipe: Recipe,
        batch_size: int,
    ) -> None:
        assert data.train_set is not None and data.val_set is not None
        self.module, self.way, self.val_set = module, recipe.way, data.val_set
        configured = module.configure_optimizers()
        self.optimizer, self.scheduler = (
            configured["optimizer"],
            configured["lr_scheduler"]["scheduler"],
        )
        self.steps = endless_steps("ours", module, data.train_set, batch_size=batch_size)
        self.train_set, self.batch_size = data.train_set, batch_size
        self.num_batches = len(data.train_set) // batch_size
        self.val_batches = [batch.to(module.device) for batch in data.val_dataloader()]
        num_scored = min(256, len(data.val_set))
        self.scored = np.linspace(0, len(data.val_set) - 1, num_scored).astype(int).tolist()
        self.num_steps = 0

    def until(self, *, loss: float, match: float, limit_s: float, console: Console) -> Quality:
        """Train and evaluate in turn until both are reached, or the limit is."""
        step_s = None if self.way == "ours" else self._step_s()
        warm_up_s = self._warm_up() if self.module.hparams.compile else 0.0
        trained_s = clock_s = 0.0
        losses: list[float] = []
        matches: list[float] = []
        loss_s = match_s = None
        while (loss_s is None or match_s is None) and trained_s < limit_s:
            trained_s += self._train(max(_SHORTEST_S, _GROWTH * trained_s))
            clock_s = self.num_steps * step_s if step_s else trained_s
            losses.append(self._loss())
            matches.append(self._match())
            loss_s = clock_s if loss_s is None and losses[-1] <= loss else loss_s
            match_s = clock_s if match_s is None and matches[-1] >= match else match_s
            console.print(
                f"{self.way}: {self.num_steps:,} steps, {clock_s:.1f} s, "
                f"val loss {losses[-1]:.4f}, call match {matches[-1]:.1%}"
            )
        return Quality(
            self.way,
            warm_up_s,
            self.num_steps,
            trained_s=clock_s,
            loss_s=loss_s,
            match_s=match_s,
            lowest_loss=min(losses),
            highest_match=max(matches),
        )

    def _warm_up(self) -> float:
        start = time.perf_counter()
        self.module.train()
        warm_up(self.steps, self.num_batches, self.optimizer)
        self._wait()
        return time.perf_counter() - start

    def _step_s(self) -> float:
        """What a gradient of the recipe's own way takes; nothing is trained.

        Where memory is too small for all rows, fewer are taken and counted as often as it takes,
        which is a little longer.
        """
        num_rows = self.batch_size
        while True:
            try:
                return self.batch_size / num_rows * self._gradient_s(num_rows)
            except torch.OutOfMemoryError:
                if num_rows == 1:
                    raise
            num_rows //= 2

    def _gradient_s(self, num_rows: int) -> float:
        """The median of three gradients after one.

        Without a GPU, one of its equal micro-steps is computed and counted as often as it repeats.
        """
        self.module.train()
        on_gpu = self.module.device.type == "cuda"
        num_counted = 1 if on_gpu else NUM_REPEATS
        theirs = endless_steps(
            self.way,
            self.module,
            self.train_set,
            batch_size=num_rows,
            num_repeats=NUM_REPEATS // num_counted,
        )
        times = []
        for step in itertools.islice(theirs, 4):
            start = time.perf_counter()
            step.add_gradients()
            self._wait()
            times.append(time.perf_counter() - start)
        self.optimizer.zero_grad()
        if on_gpu:
            torch.cuda.empty_cache()
        return num_counted * statistics.median(times[1:])

    def _train(self, at_least_s: float) -> float:
        self.module.train()
        start = time.perf_counter()
        for step in self.steps:
            step.add_gradients()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.num_steps += 1
            if time.perf_counter() - start >= at_least_s:
                break
        self._wait()
        return time.perf_counter() - start

    def _loss(self) -> float:
        """Mean over the trained tokens of all validation rows."""
        self.module.eval()
        with torch.no_grad(), self.module.trainer.precision_plugin.forward_context():
            total = sum(float(self.module.loss_sum(batch)) for batch in self.val_batches)
        return total / sum(len(batch.targets) for batch in self.val_batches)

    def _match(self) -> float:
        predictions = predict_rows(self.module, self.val_set, self.scored)
        return sum(p.is_match for p in predictions) / len(predictions)

    def _wait(self) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize()


# ---------------------------------------------------------------- the table


def _table(reached: Sequence[Quality], *, loss: float, match: float) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        caption="seconds of training without compiling (warm-up), at most "
        f"{_GROWTH:.0%}, {_SHORTEST_S} s or a step too many; the reference's steps, taken our way, "
        "count as long as its own",
    )
    for name in ("", "warm-up", "steps", f"val loss {loss}", f"call match {match:.0%}"):
        table.add_column(name, justify="right" if name in ("warm-up", "steps") else "left")
    for q in reached:
        table.add_row(
            q.way,
            f"{q.warm_up_s:.1f} s",
            f"{q.num_steps:,}",
            _seconds(q.loss_s, q.trained_s, f"{q.lowest_loss:.3f}"),
            _seconds(q.match_s, q.trained_s, f"{q.highest_match:.1%}"),
        )
    reference, ours = reached
    table.add_row(
        "times sooner",
        "",
        "",
        _ratio(reference.loss_s, ours.loss_s, reference.trained_s),
        _ratio(reference.match_s, ours.match_s, reference.trained_s),
    )
    return table


def _seconds(seconds: float | None, trained_s: float, reached: str) -> str:
    return f"{seconds:,.1f} s" if seconds else f"not in {trained_s:,.1f} s (reached {reached})"


def _ratio(reference_s: float | None, ours_s: float | None, trained_s: float) -> str:
    if ours_s is None:
        return "not known"
    return f"{reference_s / ours_s:,.1f}" if reference_s else f"more than {trained_s / ours_s:,.1f}"
