"""How fast training is, measured in one run beside the ways it is measured against.

The same rows by the ways of steps.py, each with the same clipping and optimizer step after it;
data are prepared between steps, as in a run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fc_lightning.benchmark import SHAPES, use_device
from fc_lightning.callbacks import needed_flops
from fc_lightning.caller import computes_in_bfloat16
from fc_lightning.dataset import FunctionCallDataset, Row
from fc_lightning.module import FunctionCallModule
from fc_lightning.steps import (
    NUM_REPEATS,
    Step,
    Way,
    check_batch_size,
    endless_steps,
    free_memory,
    warm_up,
)

PADDED_LENGTH = 1024


@dataclass(frozen=True)
class TrainTiming:
    """One row of the table; operations are those that the rows need, whatever the way spends."""

    way: Way
    batch_size: int
    num_steps: int  # how many were timed
    step_ms: float
    examples_per_s: float
    tokens_per_s: float
    flops_per_s: float
    peak_bytes: int | None


def benchmark_train(
    rows: Sequence[Row],
    *,
    shape: str = "gpt2",
    device: str = "auto",
    batch_size: int | None = None,
    dropout: float = 0.2,
    seconds: float = 10.0,
    console: Console | None = None,
) -> list[TrainTiming]:
    """Time the three ways on `rows`, and on a GPU ours with larger batches; print a table.

    `batch_size` is 64 on a GPU, else 32. On a GPU the shapes of the first 200 batches, or of an
    epoch that has more, are compiled before. Each way takes steps for `seconds`, and one to warm
    up and one that counts however long they take. Without a GPU, the tutorial's way takes steps of
    a single row, whose eight equal micro-steps are computed once and counted eight times. A way
    that a GPU's memory is too small for takes half the rows, a quarter and so on; larger batches
    of ours that don't fit are left out.

    Raises:
        ValueError: an unknown shape or device, fewer rows than a batch, a batch without rows, or
            one for which a GPU's memory is too small even with a single row.
    """
    if shape not in SHAPES:
        raise ValueError(f"there is no shape {shape!r}; choose from {', '.join(SHAPES)}")
    where = use_device(device)
    on_gpu = where.type == "cuda"
    if batch_size is None:
        batch_size = 64 if on_gpu else 32
    dataset = FunctionCallDataset(
        rows, block_size=PADDED_LENGTH, pad_to_multiple_of=16 if on_gpu else 1
    )
    check_batch_size(batch_size, len(dataset))
    halves = [batch_size >> n for n in range(batch_size.bit_length())]
    measured: list[tuple[Way, list[int]]] = [("reference", halves if on_gpu else [1])]
    measured += [("longest", halves), ("ours", halves)]
    if on_gpu:
        larger = [n * batch_size for n in (4, 8, 16)]
        measured += [("ours", [size]) for size in larger if size <= len(dataset)]
    timings = []
    for way, sizes in measured:
        for size in sizes:
            module = _module(shape, dropout=dropout, compile=on_gpu).to(where)
            timing = _time_if_it_fits(module, dataset, way, size, seconds=seconds)
            del module
            free_memory()
            if timing is not None:
                timings.append(timing)
                break
    (console or Console()).print(_table(timings, shape, where))
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


# ---------------------------------------------------------------- the clock


def _time_if_it_fits(
    module: FunctionCallModule,
    dataset: FunctionCallDataset,
    way: Way,
    batch_size: int,
    *,
    seconds: float,
) -> TrainTiming | None:
    """None if memory runs out, but for a single row."""
    try:
        return _time(module, dataset, way, batch_size, seconds=seconds)
    except torch.OutOfMemoryError as error:
        if batch_size == 1:
            raise ValueError("out of memory with a single row; take a smaller shape") from error
        return None


def _time(
    module: FunctionCallModule,
    dataset: FunctionCallDataset,
    way: Way,
    batch_size: int,
    *,
    seconds: float,
) -> TrainTiming:
    on_gpu = module.device.type == "cuda"
    is_shortened = way == "reference" and not on_gpu
    steps = endless_steps(
        way, module, dataset, batch_size=batch_size, num_repeats=1 if is_shortened else NUM_REPEATS
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=on_gpu)
    module.train()
    if module.hparams.compile:
        # Long enough to meet the rare shapes too: to compile one takes longer than many steps.
        warm_up(steps, max(200, len(dataset) // batch_size), optimizer)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timed: list[tuple[float, list[Step]]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(timed) < 2:
        # The host waits for a GPU once in ten steps, as rarely as in a run.
        some = itertools.islice(steps, 10 if on_gpu else 1)
        timed.append(_take(module, optimizer, some, num_times=NUM_REPEATS if is_shortened else 1))
    timed = timed[1:]
    elapsed = sum(duration for duration, _ in timed)
    batches = [step.rows for _, taken in timed for step in taken]
    rows = [row for batch in batches for row in batch]
    return TrainTiming(
        way,
        batch_size,
        len(batches),
        1e3 * elapsed / len(batches),
        len(rows) / elapsed,
        int((dataset.lengths[rows] - 1).sum()) / elapsed,
        3 * sum(needed_flops(module, dataset[batch]) for batch in batches) / elapsed,
        torch.cuda.max_memory_reserved() if on_gpu else None,
    )


def _take(
    module: FunctionCallModule,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[Step],
    *,
    num_times: int,
) -> tuple[float, list[Step]]:
    """Take steps; how long they took in seconds, their gradients counted `num_times`."""
    taken, uncounted_s = [], 0.0
    start = time.perf_counter()
    for step in steps:
        begin = time.perf_counter()
        step.add_gradients()
        uncounted_s += (num_times - 1) * (time.perf_counter() - begin)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken.append(step)
    if module.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start + uncounted_s, taken


# ---------------------------------------------------------------- the table


def _table(timings: Sequence[TrainTiming], shape: str, device: torch.device) -> Table:
    on_gpu = device.type == "cuda"
    threads = f"CPU, threads: {torch.get_num_threads()}"
    where = torch.cuda.get_device_name(device) if on_gpu else threads
    dtype = torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    peak = get_available_flops(device, dtype) if on_gpu else None
    names = ["way", "rows", "ms/step", "examples/s", "times", "tokens/s", "TFLOP/s"]
    if on_gpu:
        names += ["MFU", "GB"]
    caption = "FLOPs that the rows need: no padding, the prefix once a batch"
    if not on_gpu:
        caption += (
            f"\nreference: one row, one of its {NUM_REPEATS} equal micro-steps measured"
            "\nMFU and memory: not known on a CPU"
        )
    elif peak is None:
        caption += "\nMFU: the peak of this GPU is not known"
    table = Table(
        title=f"{shape}, {where}, torch {torch.__version__}, {str(dtype)[6:]}",
        caption=caption,
        box=SIMPLE_HEAD,
        collapse_padding=True,  # eighty columns are enough
        pad_edge=False,
    )
    for name in names:
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for t in timings:
        cells = [
            t.way,
            f"{t.batch_size}",
            _three_digits(t.step_ms),
            _three_digits(t.examples_per_s),
            _three_digits(t.examples_per_s / timings[0].examples_per_s),
            _three_digits(t.tokens_per_s),
            _three_digits(t.flops_per_s / 1e12),
            f"{t.flops_per_s / peak:.1%}" if peak else "",
            f"{t.peak_bytes / 1e9:.1f}" if t.peak_bytes else "",
        ]
        table.add_row(*cells[: len(names)])
    return table


def _three_digits(value: float) -> str:
    """12,345, 123, 12.3, 1.23, 0.0123"""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
