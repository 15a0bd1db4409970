"""Which rows go into which batch, in an order that can be resumed from any point of an epoch.

Batches hold rows of like length, or of any where they are packed, and are the same for any number
of workers. What a batch of rows looks like is dataset.py's business, or textdata.py's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fc_lightning.dataset import Batch, DataError


def check_batch_limit(batch_size: int | None, max_tokens: int | None) -> None:
    """Refuse, with a ValueError, anything but one limit of a batch, of rows or of tokens."""
    if batch_size is None and max_tokens is None:
        raise ValueError("data.batch_size and data.max_tokens are both null; set one of them")
    if batch_size is not None and max_tokens is not None:
        raise ValueError(
            f"data.batch_size {batch_size} and data.max_tokens {max_tokens} both limit a batch; "
            "set one of them to null"
        )
    for name, limit in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if limit is not None and limit < 1:
            raise ValueError(f"data.{name} must be at least 1, not {limit}")


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of rows of like length, in an order set by (seed, epoch) and the same on any machine.

    Every row is in exactly one batch of an epoch. A batch has `batch_size` rows, or as many as
    times the longest of their `lengths` make at most `max_tokens`. With several ranks, a batch of
    as many times the size is dealt out over them (so one may hold a row too many), and together
    the ranks see exactly what one process with the larger batch sees. Without `sort_by_length`
    rows of any lengths meet, as they may where they are packed: batches then have few shapes, and
    batches that are accumulated hold what one larger batch would, but for an epoch's last ones. A
    budget of tokens always sorts.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        sort_by_length: bool = True,
        num_ranks: int = 1,
        rank: int = 0,
    ) -> None:
        check_batch_limit(batch_size, max_tokens)
        if max_tokens is not None and max_tokens < (longest := max(lengths)):
            raise DataError(
                f"data.max_tokens {max_tokens} is less than the {longest} of the longest row; "
                "raise it, or lower data.block_size, which leaves long rows out"
            )
        if shuffle and len(lengths) < num_ranks:
            raise DataError(f"{len(lengths)} training rows can't be shared by {num_ranks} ranks")
        self.lengths, self.batch_size, self.max_tokens = lengths, batch_size, max_tokens
        self.seed, self.shuffle, self.sort_by_length = seed, shuffle, sort_by_length
        self._is_sorted = sort_by_length or max_tokens is not None
        self.num_ranks, self.rank = num_ranks, rank
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def identity(self) -> dict[str, int | None]:
        """What the order of an epoch follows from, besides its number."""
        return {
            "num_rows": len(self.lengths),
            "num_padded_tokens": int(self.lengths.sum()),
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "num_ranks": self.num_ranks,
            "seed": self.seed,
            "sort_by_length": self.sort_by_length,
        }

    def __len__(self) -> int:
        """Batches in a whole epoch, the same for all ranks, wherever the next pass begins."""
        return len(self._bounds())

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        bounds = self._bounds()
        if self.shuffle and self._is_sorted:
            np.random.default_rng((self.seed, self.epoch, 2)).shuffle(bounds)
        for start, stop in bounds[self.first_batch :]:
            yield order[start:stop][self.rank :: self.num_ranks].tolist()

    def _order(self) -> np.ndarray:
        """All rows, sorted by length within 50 batches of shuffled ones, or not at all.

        A budget of tokens has one sorted whole, so that each epoch has as many batches.
        """
        if not self.shuffle:
            return np.argsort(self.lengths, kind="stable")
        random = np.random.default_rng((self.seed, self.epoch, 1))
        order = random.permutation(len(self.lengths))
        if not self._is_sorted:
            return order
        chunk = 50 * self.batch_size * self.num_ranks if self.batch_size else len(order)
        chunks = [order[i : i + chunk] for i in range(0, len(order), chunk)]
        return np.concatenate([c[np.argsort(self.lengths[c], kind="stable")] for c in chunks])

    def _bounds(self) -> list[tuple[int, int]]:
        """Where each global batch starts and stops in the order.

        In training, where every rank must have rows for every step, a tail with fewer rows than
        ranks takes some of the batch before it, or joins it if that then had too few;
        unshuffled, the last ranks' share of it is empty.
        """
        total, ranks = len(self.lengths), self.num_ranks
        starts = (
            list(range(0, total, self.batch_size * ranks))
            if self.batch_size
            else _budget(np.sort(self.lengths), (self.max_tokens or 0) * ranks)
        )
        if self.shuffle and len(starts) > 1 and total - starts[-1] < ranks:
            starts.pop()
            if total - starts[-1] >= 2 * ranks:
                starts.append(total - ranks)
        return list(zip(starts, [*starts[1:], total], strict=True))


def _budget(lengths: np.ndarray, max_tokens: int) -> list[int]:
    """Where batches of rows with these ascending lengths start, each as large as may be."""
    starts = [0]
    for row, length in enumerate(lengths.tolist()):
        if (row + 1 - starts[-1]) * length > max_tokens:
            starts.append(row)
    return starts


class _WithEmptyBatches(Dataset[Batch]):
    """A dataset of batches that has one for no rows too, so that ranks never wait in vain."""

    def __init__(self, batches: Any, is_packed: bool) -> None:
        self.batches, self.is_packed = batches, is_packed

    def __getitem__(self, rows: list[int]) -> Batch:
        if rows:
            return self.batches.packed(rows) if self.is_packed else self.batches[rows]
        nothing = torch.empty(0, dtype=torch.int64)
        return Batch(nothing, nothing.view(0, 0), nothing, nothing, [], [])


class BatchLoader:
    """The batches of a dataset in a sampler's order, from any point of an epoch on.

    Around a DataLoader rather than one, so that Lightning leaves sampler and rows alone. Lightning
    calls `sampler.set_epoch` before each epoch, and saves `state_dict` with every checkpoint.
    Batches are counted as they are handed out: what workers have prepared ahead is not lost.
    """

    batch_sampler = None  # Lightning asks whatever has a sampler for one

    def __init__(
        self,
        dataset: Dataset[Batch],
        sampler: LengthBatchSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        is_packed: bool = False,
    ) -> None:
        # One index of this "dataset" is a whole batch, so the batch sampler samples "rows".
        self._loader: DataLoader[Batch] = DataLoader(
            _WithEmptyBatches(dataset, is_packed),
            batch_size=None,
            sampler=sampler,  # type: ignore[arg-type]
            # Its own generator: seeding workers must not move the global random state.
            generator=torch.Generator(),
            num_workers=num_workers,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=pin_memory,
        )
        self.sampler = sampler
        self._epoch = self._num_yielded = 0
        self._resumed: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, since Lightning makes iterators before it says which epoch it is: nothing
        # of this runs until the first batch is asked for.
        self._epoch, self._num_yielded = self.sampler.epoch, self._first_batch()
        self.sampler.first_batch = self._num_yielded
        for batch in self._loader:
            self._num_yielded += 1
            yield batch

    def _first_batch(self) -> int:
        state, self._resumed = self._resumed, None
        if state is None or state["epoch"] != self.sampler.epoch:
            return 0
        for name, value in self.sampler.identity.items():
            if (before := state["order"].get(name, value)) != value:
                raise DataError(
                    f"the checkpoint stands in mid-epoch, after {state['num_yielded']} batches "
                    f"drawn with {name} {before}, but {name} is {value} now; resume with the same, "
                    "or start a new run from it with model.pretrained_dir"
                )
        return state["num_yielded"]

    def state_dict(self) -> dict[str, Any]:
        if self._resumed is not None:  # no batch was asked for since
            return self._resumed
        return {
            "epoch": self._epoch,
            "num_yielded": self._num_yielded,
            "order": self.sampler.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = state


def _leave_signals_to_the_run(worker: int) -> None:
    """Let a worker live on while the run, which was asked to stop, fetches and saves."""
    os.setpgrp()  # out of reach of the terminal, and of what is sent to the run's whole group
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how the run ends a worker


def make_loader(
    dataset: Dataset[Batch],
    lengths: np.ndarray,
    *,
    trainer: Any,
    batch_size: int | None,
    max_tokens: int | None = None,
    seed: int,
    shuffle: bool,
    num_workers: int,
    is_packed: bool = False,
) -> BatchLoader:
    """A loader of this rank's share of batches; `trainer`, if there is one, says which rank."""
    sampler = LengthBatchSampler(
        lengths,
        batch_size=batch_size,
        max_tokens=max_tokens,
        seed=seed,
        shuffle=shuffle,
        sort_by_length=not is_packed,
        num_ranks=trainer.world_size if trainer else 1,
        rank=trainer.global_rank if trainer else 0,
    )
    return BatchLoader(
        dataset,
        sampler,
        num_workers=num_workers,
        pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        is_packed=is_packed,
    )
