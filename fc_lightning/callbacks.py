"""What is watched while training: sampled predictions, call metrics, and speed.

All of it is safe under DDP: prompts are shared out over the ranks, every rank takes part in every
collective, and nothing but rank 0 writes.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from fc_lightning.calibration import calibrate, calibration_figure
from fc_lightning.calls import FunctionCall, values_equal
from fc_lightning.dataset import Batch
from fc_lightning.functions import Registry
from fc_lightning.metrics import CallMetrics, confusion_figure
from fc_lightning.predictions import Prediction, predict_rows
from fc_lightning.ranks import gather, share

_SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
# By what runs are compared. TensorBoard's table shows the first five, by alphabet, and then the
# measures; with all settings in it, these would be off the screen, and those the same in most runs.
_COMPARED = (
    "dropout", "learning_rate", "optimizer", "pretrained_dir", "max_tokens_per_step",
    "rows_per_step", "shape", "train_rows", "warmup_iters", "weight_decay",
)  # fmt: skip


class SampleCalls(L.Callback):
    """Predicts a few training and validation commands now and then, and writes them down.

    Appends to `samples/train_sample.txt` and `samples/val_sample.txt` under the Trainer's
    default_root_dir, and to TensorBoard as text; wrong ones first.

    Args:
        sample_interval: optimizer steps from one sampling to the next.
        num_samples: commands of each kind.
    """

    def __init__(self, sample_interval: int = 500, num_samples: int = 8) -> None:
        if sample_interval < 1 or num_samples < 1:
            raise ValueError("sample_interval and num_samples must be at least 1")
        self.sample_interval, self.num_samples = sample_interval, num_samples
        self.seconds_spent = 0.0  # which are none of training's

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        is_mid_step = trainer.fit_loop._should_accumulate()
        if is_mid_step or step % self.sample_interval or not _has_calls(trainer):
            return
        started_at = _now(pl_module.device)
        data = trainer.datamodule
        for name, dataset in (("train", data.train_set), ("val", data.val_set)):
            # Other commands at each sampling, the same on every rank and in every run.
            random = np.random.default_rng(step)
            rows = random.permutation(len(dataset))[: self.num_samples].tolist()
            mine = predict_rows(pl_module, dataset, share(rows))
            gathered = itertools.chain.from_iterable(gather(mine))
            predictions = sorted(gathered, key=lambda p: (p.is_match, p.row))
            if trainer.is_global_zero:
                self._write(trainer, name, predictions)
        self.seconds_spent += _now(pl_module.device) - started_at

    def _write(self, trainer: L.Trainer, name: str, predictions: Sequence[Prediction]) -> None:
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}_sample.txt").open("a", encoding="utf-8") as file:
            file.write(samples_as_text(trainer.global_step, predictions))
        for writer in _tensorboard(trainer):
            table = samples_as_markdown(predictions)
            writer.add_text(f"samples/{name}", table, trainer.global_step)


def samples_as_text(step: int, predictions: Sequence[Prediction]) -> str:
    """Predictions as they stand in val_sample.txt, those that differ marked with `x`."""
    num_right = sum(p.is_match for p in predictions)
    lines = [f"step {step}: {num_right} of {len(predictions)} right", ""]
    for p in predictions:
        mark = "  " if p.is_match else "x "
        lines += [
            f"{mark}Input:     {p.command}",
            f"{mark}Actual:    {p.expected}",
            f"{mark}Predicted: {p.shown}",
            "",
        ]
    return "\n".join(lines) + "\n"


def samples_as_markdown(predictions: Sequence[Prediction]) -> str:
    """Predictions as a Markdown table, what differs in bold."""
    num_right = sum(p.is_match for p in predictions)
    lines = [
        f"{num_right} of {len(predictions)} right",
        "",
        "| | input | actual | predicted, and how sure |",
        "|---|---|---|---|",
    ]
    for p in predictions:
        command = re.sub(r"([\\`*_{}\[\]|#!])", r"\\\1", p.command).replace("<", "&lt;")
        actual = _marked(p.expected, p.predicted)
        predicted = _marked(p.predicted, p.expected) if p.predicted else f"**{_code(p.shown)}**"
        # Not a column: TensorBoard would make it so narrow that numbers break.
        predicted = f"{predicted} {p.confidence:.0%}"
        cells = ("✓" if p.is_match else "**✗**", command, actual, predicted)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _marked(call: FunctionCall, other: FunctionCall | None) -> str:
    """A call in Markdown, in bold where the other one differs."""
    if other is None or call.name != other.name:
        return f"**{_code(str(call))}**"
    pieces = []
    for name, value in call.arguments.items():
        is_same = name in other.arguments and values_equal(value, other.arguments[name])
        piece = _code(f"{name}={value!r}")
        pieces.append(piece if is_same else f"**{piece}**")
    return f"{_code(call.name)}({', '.join(pieces)})"


def _code(text: str) -> str:
    plain = " ".join(text.split()).replace("`", "'")
    return f"`{plain}`"  # in code a | divides no cells


class ValidateCalls(L.Callback):
    """Generates calls at each validation and logs how many are right, as monitors too.

    Logs `val/call_match`, `val/function_match` and the like (see metrics.CallMetrics), by function
    as `val_call_match/<function>`; confusion of functions and calibration as figures; and the run's
    hyperparameters beside its last measures. `validate` and `test` score every row.

    Args:
        num_examples: validation rows scored during fit, evenly spread over the set; 0 for none.
        num_final_examples: the same, for the score at the end of fit.
    """

    def __init__(self, num_examples: int = 256, num_final_examples: int = 2500) -> None:
        self.num_examples, self.num_final_examples = num_examples, num_final_examples
        self._num_scored: int | None = None  # all
        self.predictions: list[Prediction] = []  # of this rank, from the last validation

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        measures = ["call_match", "function_match", "argument_f1"] if _has_calls(trainer) else []
        log_hyperparameters(trainer, pl_module, [f"val/{name}" for name in (*measures, "loss")])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            is_fitting = trainer.state.fn == "fit"
            num_scored = self.num_examples if is_fitting else self._num_scored
            self._score(trainer, pl_module, "val", num_scored)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._num_scored = self.num_final_examples

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._score(trainer, pl_module, "test", None)

    def _score(
        self, trainer: L.Trainer, module: L.LightningModule, stage: str, num_examples: int | None
    ) -> None:
        if not _has_calls(trainer):
            return
        dataset = trainer.datamodule.val_set
        num_rows = len(dataset) if num_examples is None else min(num_examples, len(dataset))
        if not num_rows:
            return
        rows = np.linspace(0, len(dataset) - 1, num_rows).astype(int)
        by_length = rows[np.argsort(dataset.prompt_lengths[rows], kind="stable")].tolist()
        mine = share(by_length)
        batches = (mine[i : i + 256] for i in range(0, len(mine), 256))
        self.predictions = [p for batch in batches for p in predict_rows(module, dataset, batch)]
        metrics = score(trainer.datamodule.registry, self.predictions, module.device)
        for name, value in metrics.compute().items():
            # TensorBoard groups charts by what stands before the first slash.
            tag = f"{stage}_{name}" if "/" in name else f"{stage}/{name}"
            if not torch.isnan(value):
                module.log(
                    tag,
                    value.to(torch.float32),
                    prog_bar=name == "call_match",
                    logger=name != "num_examples",
                )
        confusion = metrics.confusion_matrix()
        mine_judged = [(p.confidence, p.is_match) for p in self.predictions]
        judged = list(itertools.chain.from_iterable(gather(mine_judged)))
        for writer in _tensorboard(trainer):
            figures = {
                "confusion": confusion_figure(confusion, metrics.call_names),
                "calibration": calibration_figure(calibrate(*zip(*judged, strict=True))),
            }
            for name, figure in figures.items():
                writer.add_figure(f"{stage}/{name}", figure, trainer.global_step)


def score(
    registry: Registry, predictions: Iterable[Prediction], device: torch.device
) -> CallMetrics:
    """The measures over predictions; under DDP, over those of all ranks."""
    metrics = CallMetrics(registry).to(device)
    pairs = [(p.expected, p.predicted) for p in predictions]
    metrics.update([expected for expected, _ in pairs], [predicted for _, predicted in pairs])
    return metrics


def log_hyperparameters(
    trainer: L.Trainer, module: L.LightningModule, measures: Iterable[str]
) -> None:
    """Tell every logger the run's settings; TensorBoard, which of its measures to show beside them.

    The module leaves this to be done once all is known: the pretrained model's shape, and how many
    rows a step has on all devices together.
    """
    data = trainer.datamodule
    batches_per_step = trainer.accumulate_grad_batches * trainer.world_size
    settings = {
        **module.hparams,
        **{name: getattr(module.gpt.config, name) for name in _SHAPE},
        **(
            {"rows_per_step": data.batch_size * batches_per_step}
            if data.batch_size
            else {"max_tokens_per_step": data.max_tokens * batches_per_step}
        ),
        "train_rows": len(data.train_set),
        "precision": str(trainer.precision),
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # Without metrics Lightning would add a chart of its own, of a constant -1.
            logger.log_hyperparams(settings, metrics={})
        else:
            logger.log_hyperparams(settings)
    settings["shape"] = f"{settings['n_layer']} x {settings['n_embd']}"
    shown = {name: settings[name] for name in _COMPARED if name in settings}
    plain = {n: v if type(v) in (int, float) else str(v) for n, v in shown.items()}
    for writer in _tensorboard(trainer):
        for summary in hparams(plain, dict.fromkeys(measures, 0.0)):
            writer.file_writer.add_summary(summary)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the training loss, fetched from the device only when it is drawn.

    A metric that is logged with prog_bar=True is fetched at every step, bar or no bar.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.on_train_epoch_start(trainer)  # which a run that goes on in mid-epoch is not told

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        metrics = super().get_metrics(trainer, pl_module)
        if "train/loss" in trainer.callback_metrics:
            metrics["train/loss"] = trainer.callback_metrics["train/loss"].item()
        return metrics


class ValidateLastStep(L.Callback):
    """Validates once more if a run ends between two validations, by max_steps for instance.

    Otherwise the last steps, where the learning rate is lowest, could never become the best
    checkpoint.
    """

    def __init__(self) -> None:
        self._validated_at = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated_at = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_owed = self._validated_at < trainer.global_step and trainer.enable_validation
        if is_owed and not trainer.fast_dev_run:
            trainer.validating = True  # as Lightning's own loop turns to validation and back
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True


class Throughput(L.Callback):
    """Logs examples/s, real tokens/s and MFU over windows of steps.

    Validating and sampling take none of its time. Padding counts nowhere, and a prefix that goes
    through the network once counts once in MFU. The device is waited for once a window, not once a
    step. MFU is the share of the device's own peak in its precision; without a known peak (a CPU)
    it is left out.

    Args:
        every_n_steps: batches in a window.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._peak = get_available_flops(pl_module.device, _compute_dtype(trainer))
        self._start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._start(trainer, pl_module)

    def _start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._num_batches = self._num_examples = self._num_tokens = self._num_flops = 0
        self._started_at = self._training_time(trainer, module)

    def _training_time(self, trainer: L.Trainer, module: L.LightningModule) -> float:
        sampling = sum(c.seconds_spent for c in trainer.callbacks if isinstance(c, SampleCalls))
        return _now(module.device) - sampling

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._num_batches += 1
        self._num_examples += len(batch.rows)
        self._num_tokens += batch.num_tokens
        self._num_flops += 3 * needed_flops(pl_module, batch)
        if self._num_batches < self.every_n_steps:
            return
        seconds = self._training_time(trainer, pl_module) - self._started_at
        ranks = trainer.world_size
        speeds = {
            "train/examples_per_s": ranks * self._num_examples / seconds,
            "train/tokens_per_s": ranks * self._num_tokens / seconds,
        }
        if self._peak:
            speeds["train/mfu"] = self._num_flops / seconds / self._peak
        for logger in trainer.loggers:
            logger.log_metrics(speeds, step=trainer.global_step)
        trainer.callback_metrics.update({n: torch.tensor(v) for n, v in speeds.items()})
        self._start(trainer, pl_module)


def needed_flops(module: L.LightningModule, batch: Batch) -> int:
    """Operations of a forward pass over a batch: no padding, no repeated prefix, no idle head."""
    prefix = len(batch.prefix)
    num_pairs = prefix * (prefix + 1) // 2
    num_pairs += sum(prefix * length + length * (length + 1) // 2 for length in batch.lengths)
    return module.gpt.num_flops(prefix + sum(batch.lengths), num_pairs, len(batch.targets))


def _compute_dtype(trainer: L.Trainer) -> torch.dtype:
    precision = str(trainer.precision)
    if "bf16" in precision:
        return torch.bfloat16
    return torch.float16 if "16" in precision else torch.float32


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _has_calls(trainer: L.Trainer) -> bool:
    """Whether the data are commands and their calls; of plain text there is nothing to call."""
    return hasattr(trainer.datamodule, "registry")


def _tensorboard(trainer: L.Trainer) -> Iterator[Any]:
    """The SummaryWriter of each TensorBoard logger; none but on rank 0."""
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            yield logger.experiment
