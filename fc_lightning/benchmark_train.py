"""How fast training is, measured in one run beside the ways it is measured against.

Three ways to take the same optimizer step on the same rows: the tutorial's loop (every row padded
to 1,024 tokens, vocabulary head everywhere, each batch repeated eight times), padding to the
batch's longest row, and this package's.

Shapes: B rows, T tokens a row, N trained tokens.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.throughput import get_available_flops
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fc_lightning.benchmark import SHAPES
from fc_lightning.callbacks import needed_flops
from fc_lightning.caller import computes_in_bfloat16
from fc_lightning.dataset import FunctionCallDataset, LengthBatchSampler
from fc_lightning.gpt import GPT
from fc_lightning.module import FunctionCallModule
from fc_lightning.tokenizer import PAD

NUM_REPEATS = 8  # accumulation micro-steps of the tutorial's loop, all with the same rows
PADDED_LENGTH = 1024
_IGNORED = -100

Step = Callable[[], None]  # loss and gradients of one step


@dataclass(frozen=True)
class TrainTiming:
    """One row of the table; operations are those that the rows need, whatever the way spends."""

    way: str
    batch_size: int
    step_ms: float
    examples_per_s: float
    tokens_per_s: float
    flops_per_s: float
    peak_bytes: int | None


def benchmark_train(
    dataset: FunctionCallDataset,
    *,
    shape: str = "gpt2",
    device: str = "auto",
    batch_size: int = 64,
    compile: bool | None = None,
    dropout: float = 0.2,
    seconds: float = 10.0,
    console: Console | None = None,
) -> list[TrainTiming]:
    """Time the three ways on rows of `dataset`, and ours with larger batches; print a table.

    Without a GPU, the tutorial's way takes 2 rows a step instead of `batch_size`. `compile` is on
    by default on a GPU. Each way is timed for `seconds`, after a warm-up.

    Raises:
        ValueError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; choose from {', '.join(SHAPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    compile = on_gpu if compile is None else compile
    timings = []
    for way, size in (
        ("reference", batch_size if on_gpu else 2),
        ("longest", batch_size),
        ("ours", batch_size),
        *((("ours", 4 * batch_size), ("ours", 8 * batch_size)) if on_gpu else ()),
    ):
        module = _module(shape, dropout=dropout, compile=compile).to(device)
        steps = _STEPS[way](module, dataset, size)
        timings.append(_time(module, dataset, way, size, steps, seconds=seconds))
        del module, steps
        if on_gpu:
            torch.cuda.empty_cache()
    (console or Console()).print(_table(timings, shape, torch.device(device)))
    return timings


def _module(shape: str, *, dropout: float, compile: bool) -> FunctionCallModule:
    torch.manual_seed(0)
    s = SHAPES[shape]
    return FunctionCallModule(
        n_layer=s.n_layer,
        n_head=s.n_head,
        n_embd=s.n_embd,
        block_size=PADDED_LENGTH,
        dropout=dropout,
        compile=compile,
    )


# ---------------------------------------------------------------- the ways


def _ours(
    module: FunctionCallModule, dataset: FunctionCallDataset, batch_size: int
) -> Iterator[tuple[Step, list[int]]]:
    for epoch in itertools.count():
        order = LengthBatchSampler(dataset.lengths, batch_size=batch_size)
        order.epoch = epoch
        for rows in order:
            if len(rows) < batch_size:
                continue  # so that every step has the same number of examples
            batch = dataset[rows]
            on_device = batch._replace(
                prefix=_to_device(batch.prefix, module.device),
                ids=_to_device(batch.ids, module.device),
                trained_at=_to_device(batch.trained_at, module.device),
                targets=_to_device(batch.targets, module.device),
            )
            yield functools.partial(_our_step, module, on_device), rows


def _our_step(module: FunctionCallModule, batch) -> None:
    (module.loss_sum(batch) / len(batch.targets)).backward()


def _padded(
    module: FunctionCallModule,
    dataset: FunctionCallDataset,
    batch_size: int,
    *,
    length: int | None = None,
    num_repeats: int = 1,
) -> Iterator[tuple[Step, list[int]]]:
    """Rows in random order, all positions through the head; to `length`, or the batch's longest."""
    forward = torch.compile(GPT.forward, dynamic=False) if length else GPT.forward
    forward = forward if module.hparams.compile else GPT.forward
    random = np.random.default_rng(0)
    while True:
        rows = random.choice(len(dataset), batch_size, replace=False).tolist()
        ids, targets = _pad(dataset, rows, length)
        ids, targets = _to_device(ids, module.device), _to_device(targets, module.device)
        yield functools.partial(_padded_step, module, forward, ids, targets, num_repeats), rows


def _padded_step(
    module: FunctionCallModule, forward, ids: Tensor, targets: Tensor, num_repeats: int
) -> None:
    for _ in range(num_repeats):
        logits = forward(module.gpt, ids)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)
        (loss / num_repeats).backward()


def _pad(
    dataset: FunctionCallDataset, rows: Sequence[int], length: int | None
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T) each; untrained targets are ignored."""
    length = length or int(dataset.lengths[rows].max()) - 1
    ids = torch.full((len(rows), length), PAD)
    targets = torch.full((len(rows), length), _IGNORED)
    for i, row in enumerate(rows):
        whole = torch.from_numpy(dataset.row_ids(row).astype(np.int64))
        first = int(dataset.prompt_lengths[row]) - 1
        ids[i, : len(whole) - 1] = whole[:-1]
        targets[i, first : len(whole) - 1] = whole[first + 1 :]
    return ids, targets


_STEPS: dict[str, Callable[..., Iterator[tuple[Step, list[int]]]]] = {
    "reference": functools.partial(_padded, length=PADDED_LENGTH, num_repeats=NUM_REPEATS),
    "longest": _padded,
    "ours": _ours,
}


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---------------------------------------------------------------- the clock


def _time(
    module: FunctionCallModule,
    dataset: FunctionCallDataset,
    way: str,
    batch_size: int,
    steps: Iterator[tuple[Step, list[int]]],
    *,
    seconds: float,
) -> TrainTiming:
    device = module.device
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=device.type == "cuda")
    module.train()
    num_warmup = 30 if device.type == "cuda" else 1  # covers every compiled shape
    rows: list[int] = []
    start = time.perf_counter()
    for n, (step, step_rows) in enumerate(steps):
        if n == num_warmup:
            _wait(device)
            start, rows = time.perf_counter(), []
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        rows += step_rows
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device)):
            step()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if n >= num_warmup and (device.type == "cpu" or (n - num_warmup) % 10 == 9):
            _wait(device)
            if time.perf_counter() - start > seconds:
                break
    elapsed = time.perf_counter() - start
    needed = 3 * sum(needed_flops(module, dataset[part]) for part in _parts(rows, batch_size))
    return TrainTiming(
        way,
        batch_size,
        1e3 * elapsed * batch_size / len(rows),
        len(rows) / elapsed,
        int((dataset.lengths[rows] - 1).sum()) / elapsed,
        needed / elapsed,
        torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    )


def _parts(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    yield from (list(rows[i : i + size]) for i in range(0, len(rows), size))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(timings: Sequence[TrainTiming], shape: str, device: torch.device) -> Table:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    peak = get_available_flops(device, dtype) if device.type == "cuda" else None
    title = f"{shape}, {where}, torch {torch.__version__}, {str(dtype)[6:]}"
    names = ["way", "rows", "ms/step", "examples/s", "times", "tokens/s", "TFLOP/s"]
    if device.type == "cuda":
        names += ["MFU", "GB"]
    table = Table(title=title)
    for name in names:
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for t in timings:
        cells = [
            t.way,
            f"{t.batch_size}",
            f"{t.step_ms:,.1f}",
            f"{t.examples_per_s:,.4g}",
            f"{t.examples_per_s / timings[0].examples_per_s:,.1f}",
            f"{t.tokens_per_s:,.0f}",
            f"{t.flops_per_s / 1e12:,.3g}",
            f"{t.flops_per_s / peak:.1%}" if peak else "",
            f"{t.peak_bytes / 1e9:.1f}" if t.peak_bytes else "",
        ]
        table.add_row(*cells[: len(names)])
    return table
