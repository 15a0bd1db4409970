"""Example files, token arrays, and batches of their rows.

Reads data folders and encodes their rows once into flat arrays. What a prompt looks like is
chat.py's business; which rows go into which batch is loader.py's; which folder, and for which
stage, is datamodule.py's.

Shapes: B rows, T tokens a row, P tokens of the shared prefix, N trained tokens of the batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fc_lightning.calls import FunctionCall, UnreadableCall, parse_call
from fc_lightning.chat import Example, encode_example, is_empty
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
        DataError: other keys than the three strings, or an empty command or response.
    """
    keys = {"system", "user", "assistant"}
    if not isinstance(entry, dict) or entry.keys() != keys:
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise DataError(f"{where}: needs exactly the keys system, user, assistant; found {found}")
    for key in sorted(keys):
        if not isinstance(entry[key], str):
            raise DataError(f"{where}: {key!r} must be a string, not {entry[key]!r:.40}")
    example = Example(**entry)
    if is_empty(example.command):
        raise DataError(f"{where}: the command is empty; remove the row or write what was said")
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
    """Rows right-padded to the longest, or packed, less the prefix that all of them share.

    The model reads prefix + ids; `targets` are the next tokens at the trained positions, whose
    flat indices into `ids` are `trained_at`. What is counted is plain integers, so that nobody
    has to ask the device for it.
    """

    prefix: Tensor  # (P,) token ids before every row
    ids: Tensor  # (B, T), or where rows are packed (R,), all rows end to end
    trained_at: Tensor  # (N,)
    targets: Tensor  # (N,)
    rows: list[int]  # (B,) indices into the dataset
    lengths: list[int]  # (B,) inputs of each row after the prefix, padding not counted
    starts: Tensor | None = None  # (B + 1,) where packed rows begin in ids, and the last ends

    @property
    def num_tokens(self) -> int:
        """Input tokens of all rows, each with its prefix; padding is none."""
        return sum(self.lengths) + len(self.prefix) * len(self.rows)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on another device; Lightning calls this."""
        moved: dict[str, Any] = {
            name: field.to(device, non_blocking=True)
            for name, field in self._asdict().items()
            if isinstance(field, Tensor)
        }
        return self._replace(**moved)

    @property
    def is_trained(self) -> Tensor:
        """Whether the token after each position is trained, as `ids` are shaped."""
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

    @property
    def padded_lengths(self) -> np.ndarray:
        """By row, T of a batch whose longest it is: its inputs after the prefix, and padding."""
        return self._padded(self.lengths)

    def _padded(self, lengths: np.ndarray) -> np.ndarray:
        padded = -(-(lengths - 1) // self.multiple) * self.multiple
        return np.minimum(padded, self.block_size) - self.prefix_length

    def packed(self, rows: list[int]) -> Batch:
        """The batch of `rows` with all of them end to end, for `GPT.hidden_states_packed`."""
        P = self.prefix_length
        lengths = self.lengths[rows] - 1 - P  # inputs after the prefix
        starts = np.concatenate([[0], np.cumsum(lengths)])
        total = int(starts[-1])
        # Rounded up, by less than 256 tokens or 1/32, to few shapes to compile for.
        multiple = max(256, 1 << max(0, total.bit_length() - 6))
        at = np.arange(total) - np.repeat(starts[:-1], lengths)  # in the row
        source = np.repeat(self.starts[rows] + P, lengths) + at
        ids = np.full(-(-(P + total) // multiple) * multiple - P, PAD)
        ids[:total] = self.ids[source]
        is_trained = at >= np.repeat(self.prompt_lengths[rows] - 1 - P, lengths)
        return Batch(
            torch.from_numpy(self.row_ids(rows[0])[:P].astype(np.int64)),
            torch.from_numpy(ids),
            torch.from_numpy(np.flatnonzero(is_trained)),
            torch.from_numpy(self.ids[source[is_trained] + 1].astype(np.int64)),
            [int(row) for row in rows],
            lengths.tolist(),
            torch.from_numpy(starts),
        )

    def __getitem__(self, rows: list[int]) -> Batch:
        P = self.prefix_length
        lengths = self.lengths[rows] - 1 - P  # inputs after the prefix
        at = np.arange(self._padded(self.lengths[rows]).max())
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
