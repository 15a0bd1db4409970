"""Example files, token arrays, and batches of rows of like length.

Reads data folders, encodes their rows once into flat arrays, and says which rows go into which
batch in an order that can be resumed. What a prompt looks like is chat.py's business; which
folder, and for which stage, is datamodule.py's.

Shapes: B rows, T tokens a row, P tokens of the shared prefix, N trained tokens of the batch.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fc_lightning.calls import FunctionCall, UnreadableCall, parse_call
from fc_lightning.chat import Example, encode_example
from fc_lightning.functions import Registry
from fc_lightning.tokenizer import PAD


class DataError(ValueError):
    """Example files that can't be used; the message says which file and row, and what to do."""


# ---------------------------------------------------------------- files


def cache_folder() -> Path:
    """Where what was made once is kept: $FC_LIGHTNING_CACHE, or ~/.cache/fc_lightning."""
    return Path(os.environ.get("FC_LIGHTNING_CACHE") or Path.home() / ".cache" / "fc_lightning")


@dataclass(frozen=True)
class Row:
    """An example and where it stands: `number` counts the file's rows from 0."""

    example: Example
    file: Path
    number: int

    @property
    def where(self) -> str:
        return f"{self.file}: row {self.number}"


def find_files(folder: Path, kind: str) -> list[Path]:
    """The folder's JSON files whose name contains `kind` ("train" or "test"), sorted.

    Raises:
        DataError: no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds JSON files of examples")
    files = sorted(path for path in folder.glob("*.json") if kind in path.name)
    if not files:
        raise DataError(f"{folder}: no *.json file with {kind!r} in its name")
    return files


def read_rows(path: str | Path, kind: str = "") -> list[Row]:
    """The rows of one file, or of all a folder's files whose name contains `kind`.

    Raises:
        DataError: the first file or row that can't be used, and why.
    """
    path = Path(path)
    files = [path] if path.is_file() else find_files(path, kind)
    return [
        Row(read_example(entry, f"{file}: row {number}"), file, number)
        for file in files
        for number, entry in enumerate(read_entries(file))
    ]


def read_entries(file: Path) -> list[object]:
    """The entries of a file, whatever they are; `read_example` makes an example of one.

    Raises:
        DataError: the file holds no JSON list, or an empty one.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise DataError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise DataError(f"{file}: must be a JSON list of examples, not a {type(entries).__name__}")
    if not entries:
        raise DataError(f"{file}: holds no example")
    return entries


def read_example(entry: object, where: str) -> Example:
    """The example that an entry of a file is; `where` opens the message if it is none.

    Raises:
        DataError: other keys than the three strings, or an empty response.
    """
    keys = {"system", "user", "assistant"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{where}: needs exactly the keys system, user, assistant; found {found}")
    for key in sorted(keys):
        if not isinstance(entry[key], str):
            raise DataError(f"{where}: {key!r} must be a string, not {entry[key]!r:.40}")
    example = Example(**entry)
    if not example.response.strip():
        raise DataError(f"{where}: the response is empty; remove the row or write its call")
    return example


def expected_call(row: Row, registry: Registry) -> FunctionCall:
    """The call a row teaches, in canonical form.

    Raises:
        DataError: the response holds no readable call, or one of a function unknown here.
    """
    try:
        call = parse_call(row.example.assistant)
    except UnreadableCall as error:
        raise DataError(f"{row.where}: no readable call in the response: {error}") from None
    if registry.spec(call.name) is None:
        raise DataError(
            f"{row.where}: function {call.name!r} is not in the registry; "
            "set data.functions to the domain file that defines it"
        )
    return registry.canonical(call)


# ---------------------------------------------------------------- rows as tokens


class Batch(NamedTuple):
    """Rows of like length, right-padded to the longest, less the prefix that all of them share.

    The model reads prefix + ids; `targets` are the next tokens at the trained positions, whose
    flat indices into (B, T) are `trained_at`. What is counted is plain integers, so that nobody
    has to ask the device for it.
    """

    prefix: Tensor  # (P,) token ids before every row
    ids: Tensor  # (B, T)
    trained_at: Tensor  # (N,)
    targets: Tensor  # (N,)
    rows: list[int]  # (B,) indices into the dataset
    lengths: list[int]  # (B,) inputs of each row after the prefix, padding not counted

    @property
    def num_tokens(self) -> int:
        """Input tokens of all rows, each with its prefix; padding is none."""
        return sum(self.lengths) + len(self.prefix) * len(self.rows)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on another device; Lightning calls this."""
        prefix, ids, trained_at, targets = (t.to(device, non_blocking=True) for t in self[:4])
        return self._replace(prefix=prefix, ids=ids, trained_at=trained_at, targets=targets)

    @property
    def is_trained(self) -> Tensor:
        """Whether the token after each position is trained, (B, T)."""
        flat = torch.zeros(self.ids.numel(), dtype=torch.bool, device=self.ids.device)
        return flat.index_fill(0, self.trained_at, True).view(self.ids.shape)


class FunctionCallDataset(Dataset[Batch]):
    """Encoded rows in flat arrays. Indexed by a list of rows, it gives their `Batch`."""

    def __init__(
        self, rows: Sequence[Row], *, block_size: int, pad_to_multiple_of: int = 1
    ) -> None:
        """Encode `rows`; those with more than `block_size` tokens are left out, never cut.

        `too_long` lists what was left out, with the number of tokens each row needs. Batches are
        padded so that P + T is a multiple of `pad_to_multiple_of`, or `block_size`.
        """
        encoded = [encode_example(row.example) for row in rows]
        # The last id is a target only, so a row of L ids needs L - 1 positions.
        fits = [len(e.ids) - 1 <= block_size for e in encoded]
        self.rows = [row for row, fit in zip(rows, fits, strict=True) if fit]
        self.too_long = [
            (row, len(e.ids) - 1)
            for row, e, fit in zip(rows, encoded, fits, strict=True)
            if not fit
        ]
        kept = [e for e, fit in zip(encoded, fits, strict=True) if fit]
        self.lengths = np.array([len(e.ids) for e in kept], dtype=np.int64)
        self.prompt_lengths = np.array([e.num_prompt_tokens for e in kept], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.ids = np.fromiter((i for e in kept for i in e.ids), dtype=np.uint16)
        self.prefix_length = self._shared_prefix_length()
        self.block_size, self.multiple = block_size, pad_to_multiple_of

    def __len__(self) -> int:
        return len(self.rows)

    def row_ids(self, row: int) -> np.ndarray:
        """All token ids of one row, (T + 1,)."""
        return self.ids[self.starts[row] : self.starts[row] + self.lengths[row]]

    def __getitem__(self, rows: list[int]) -> Batch:
        P = self.prefix_length
        lengths = self.lengths[rows] - 1 - P  # inputs after the prefix
        padded = -(-(P + int(lengths.max())) // self.multiple) * self.multiple
        at = np.arange(min(padded, self.block_size) - P)
        is_real = at < lengths[:, None]  # (B, T)
        source = np.where(is_real, self.starts[rows][:, None] + P + at, 0)
        ids = np.where(is_real, self.ids[source], PAD)
        is_trained = is_real & (at >= self.prompt_lengths[rows][:, None] - 1 - P)
        return Batch(
            torch.from_numpy(self.row_ids(rows[0])[:P].astype(np.int64)),
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(np.flatnonzero(is_trained)),
            torch.from_numpy(self.ids[source[is_trained] + 1].astype(np.int64)),
            [int(row) for row in rows],
            lengths.tolist(),
        )

    def _shared_prefix_length(self) -> int:
        """How many first tokens all rows have in common, END_OF_PROMPT never among them."""
        if not len(self):
            return 0
        shortest = int(self.prompt_lengths.min()) - 1
        heads = self.ids[self.starts[:, None] + np.arange(shortest)]  # (rows, shortest)
        is_shared = (heads == heads[0]).all(axis=0)
        return shortest if is_shared.all() else int(is_shared.argmin())


# ---------------------------------------------------------------- order


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of rows of like length, in an order set by (seed, epoch) and the same on any machine.

    Every row is in exactly one batch of an epoch. With several ranks, a batch of
    num_ranks * batch_size rows is dealt out over them, so together the ranks see exactly what one
    process with the larger batch sees.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        num_ranks: int = 1,
        rank: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if shuffle and len(lengths) < num_ranks:
            raise DataError(f"{len(lengths)} training rows can't be shared by {num_ranks} ranks")
        self.lengths, self.batch_size, self.seed, self.shuffle = lengths, batch_size, seed, shuffle
        self.num_ranks, self.rank = num_ranks, rank
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def identity(self) -> dict[str, int]:
        """What the order of an epoch follows from, besides its number."""
        return {
            "num_rows": len(self.lengths),
            "batch_size": self.batch_size,
            "num_ranks": self.num_ranks,
            "seed": self.seed,
        }

    def __len__(self) -> int:
        """Batches in a whole epoch, the same for all ranks, wherever the next pass begins."""
        return len(self._bounds())

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        bounds = self._bounds()
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch, 2)).shuffle(bounds)
        for start, stop in bounds[self.first_batch :]:
            yield order[start:stop][self.rank :: self.num_ranks].tolist()

    def _order(self) -> np.ndarray:
        """All rows, sorted by length within large shuffled chunks (or, unshuffled, everywhere)."""
        if not self.shuffle:
            return np.argsort(self.lengths, kind="stable")
        random = np.random.default_rng((self.seed, self.epoch, 1))
        order = random.permutation(len(self.lengths))
        chunk = self.batch_size * self.num_ranks * 50
        chunks = [order[i : i + chunk] for i in range(0, len(order), chunk)]
        return np.concatenate([c[np.argsort(self.lengths[c], kind="stable")] for c in chunks])

    def _bounds(self) -> list[tuple[int, int]]:
        """Where each global batch starts and stops in the order.

        In training, where every rank must have rows for every step, a tail with fewer rows than
        ranks joins the batch before it; unshuffled, the last ranks' share of it is empty.
        """
        size, total = self.batch_size * self.num_ranks, len(self.lengths)
        starts = list(range(0, total, size))
        if self.shuffle and len(starts) > 1 and total - starts[-1] < self.num_ranks:
            starts.pop()
        return list(zip(starts, [*starts[1:], total], strict=True))


class _WithEmptyBatches(Dataset[Batch]):
    """A dataset of batches that has one for no rows too, so that ranks never wait in vain."""

    def __init__(self, batches: Dataset[Batch]) -> None:
        self.batches = batches

    def __getitem__(self, rows: list[int]) -> Batch:
        if rows:
            return self.batches[rows]
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
    ) -> None:
        # One index of this "dataset" is a whole batch, so the batch sampler samples "rows".
        self._loader: DataLoader[Batch] = DataLoader(
            _WithEmptyBatches(dataset),
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
            if (before := state["order"].get(name)) != value:
                raise DataError(
                    f"the checkpoint stands in mid-epoch, after {state['num_yielded']} batches "
                    f"drawn with {name} {before}, but {name} is {value} now; resume with the same, "
                    "or start a new run from it with model.pretrained_dir"
                )
        return state["num_yielded"]

    def state_dict(self) -> dict[str, Any]:
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
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_workers: int,
) -> BatchLoader:
    """A loader of this rank's share of batches; `trainer`, if there is one, says which rank."""
    sampler = LengthBatchSampler(
        lengths,
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        num_ranks=trainer.world_size if trainer else 1,
        rank=trainer.global_rank if trainer else 0,
    )
    return BatchLoader(
        dataset,
        sampler,
        num_workers=num_workers,
        pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
    )
