"""Ways to compute the gradient of a training step: this package's, and two to measure it against.

The tutorial's loop pads every row to the model's block, puts all positions through the vocabulary
head, and repeats each batch eight times; plain padding stops at the batch's longest row.

Shapes: B rows, T tokens a row, V vocabulary.
"""

from __future__ import annotations

import collections
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fc_lightning.caller import computes_in_bfloat16
from fc_lightning.dataset import Batch, FunctionCallDataset
from fc_lightning.gpt import GPT
from fc_lightning.loader import BatchLoader, LengthBatchSampler
from fc_lightning.tokenizer import PAD

NUM_REPEATS = 8  # accumulation micro-steps of the tutorial's loop, all with the same rows
_IGNORED = -100

Way = Literal["reference", "longest", "ours"]


class Step(NamedTuple):
    """A batch on the device, whose gradients `add_gradients` adds to those of the weights.

    Of ours on a GPU, gradients must be used and dropped before the next step's are computed.
    """

    rows: list[int]  # of the dataset
    shape: tuple[int, ...]  # (B, T), or of packed rows (R,); each one may be compiled anew
    add_gradients: Callable[[], None]


def endless_steps(
    way: Way,
    module: Any,
    dataset: FunctionCallDataset,
    *,
    batch_size: int,
    num_repeats: int = NUM_REPEATS,
) -> Iterator[Step]:
    """The batches of epoch after epoch, all with `batch_size` rows; the same in every run.

    `module` is a FunctionCallModule. Only "reference" repeats a batch.

    Raises:
        ValueError: the dataset has fewer rows than a batch, or a batch has none.
    """
    check_batch_size(batch_size, len(dataset))
    if way == "ours":
        return _our_steps(module, dataset, batch_size)
    length = module.block_size if way == "reference" else None
    return _padded_steps(
        module, dataset, batch_size, length, num_repeats if way == "reference" else 1
    )


def check_batch_size(batch_size: int, num_rows: int) -> None:
    """Refuse, with a ValueError, batches without rows, or of more rows than there are."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if num_rows < batch_size:
        raise ValueError(f"{num_rows} rows are too few for a batch of {batch_size}")


def free_memory() -> None:
    """Give back what a module that is gone has compiled, and what its CUDA graphs held."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def warm_up(steps: Iterator[Step], num_steps: int, optimizer: torch.optim.Optimizer) -> None:
    """Compute each shape among the next `num_steps` as often as it takes to be fast.

    Once to compile it, once to record it as CUDA graphs, once to replay them. Leaves no gradients.
    """
    times = collections.Counter[tuple[int, ...]]()
    for step in itertools.islice(steps, num_steps):
        for _ in range(3 - times[step.shape]):
            step.add_gradients()
            optimizer.zero_grad()
            times[step.shape] += 1


# ---------------------------------------------------------------- ours


def _our_steps(module: Any, dataset: FunctionCallDataset, batch_size: int) -> Iterator[Step]:
    sampler = LengthBatchSampler(
        dataset.lengths, batch_size=batch_size, sort_by_length=not module.can_pack
    )
    on_gpu = module.device.type == "cuda"
    loader = BatchLoader(dataset, sampler, pin_memory=on_gpu, is_packed=module.can_pack)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for batch in loader:
            if len(batch.rows) == batch_size:
                on_device = batch.to(module.device)
                add = functools.partial(_add_our_gradients, module, on_device)
                yield Step(batch.rows, tuple(batch.ids.shape), add)


def _add_our_gradients(module: Any, batch: Batch) -> None:
    with _autocast(module.device):
        loss = module.loss_sum(batch) / len(batch.targets)
    loss.backward()


# ---------------------------------------------------------------- padded


def _padded_steps(
    module: Any,
    dataset: FunctionCallDataset,
    batch_size: int,
    length: int | None,
    num_repeats: int,
) -> Iterator[Step]:
    """Rows in random order, padded to `length`, or to the batch's longest."""
    is_compiled = module.hparams.compile and length is not None  # not for each of many lengths
    forward = torch.compile(GPT.forward, dynamic=False) if is_compiled else GPT.forward
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(dataset)).tolist()
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            ids, targets = (_to_device(t, module.device) for t in _pad(dataset, rows, length))
            add = functools.partial(
                _add_padded_gradients, module.gpt, forward, ids, targets, num_repeats
            )
            yield Step(rows, (batch_size, ids.size(1)), add)


def _add_padded_gradients(
    gpt: GPT, forward: Callable[..., Tensor], ids: Tensor, targets: Tensor, num_repeats: int
) -> None:
    for _ in range(num_repeats):
        with _autocast(ids.device):
            logits = forward(gpt, ids)  # (B, T, V)
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


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device))
