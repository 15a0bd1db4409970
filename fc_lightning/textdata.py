"""Plain text for pre-training: files -> token shards -> windows -> the same `Batch` as calls.

A text file is tokenized once, into a shard: a flat file of uint16 ids that is mapped, never read
whole (nanoGPT's train.bin is one too). In the text, documents are separated by a line that holds
only `<|endoftext|>`; in a shard, each ends with 50256. Windows run across documents.

Shapes: B windows, T tokens a window.
"""

from __future__ import annotations

import hashlib
import itertools
import lzma
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import Dataset

from fc_lightning.dataset import Batch, DataError, cache_folder
from fc_lightning.loader import BatchLoader, make_loader
from fc_lightning.tokenizer import END_OF_TEXT, get_encoding

SEPARATOR = "<|endoftext|>"


# ---------------------------------------------------------------- text -> shards


def read_documents(file: Path) -> Iterator[str]:
    """The documents of a text file, plain or compressed (.xz), without the separating lines.

    Raises:
        DataError: the file can't be read, or isn't UTF-8.
    """
    try:
        with (lzma.open if file.suffix == ".xz" else open)(file, "rt", encoding="utf-8") as lines:
            for is_end, group in itertools.groupby(lines, lambda line: line.strip() == SEPARATOR):
                document = "".join(group).strip("\n")
                if document and not is_end:
                    yield document
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror or error})") from None
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{file}: damaged ({error}); copy it again") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def write_shard(file: Path, shard: Path) -> None:
    """Tokenize a text file on all cores; 25 MB of English a second and core.

    Raises:
        DataError: the file can't be read, or holds no text.
    """
    encoding = get_encoding()

    def encode(document: str) -> bytes:
        ids = encoding.encode_to_numpy(document, disallowed_special=())  # lets other threads run
        return np.append(ids, END_OF_TEXT).astype(np.uint16).tobytes()

    shard.parent.mkdir(parents=True, exist_ok=True)
    partial = shard.with_name(f"{shard.name}-{os.getpid()}")
    try:
        with partial.open("wb") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
            documents = read_documents(file)
            while some := list(itertools.islice(documents, 2048)):
                out.writelines(pool.map(encode, some))
        if not partial.stat().st_size:
            raise DataError(f"{file}: holds no text")
        partial.rename(shard)
    finally:
        partial.unlink(missing_ok=True)


# ---------------------------------------------------------------- shards -> windows


class TextWindows(Dataset[Batch]):
    """Windows of T + 1 ids, cut from shards at given starts; all of their tokens are trained.

    Indexed by a list of windows, it gives their `Batch`.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], starts: Sequence[np.ndarray], *, block_size: int
    ) -> None:
        self.shards, self.block_size = shards, block_size
        self.shard_of = np.repeat(np.arange(len(shards)), [len(s) for s in starts])
        self.starts = np.concatenate([np.empty(0, dtype=np.int64), *starts])

    def __len__(self) -> int:
        return len(self.starts)

    def keep(self, windows: np.ndarray) -> None:
        """Drop all windows but these."""
        self.shard_of, self.starts = self.shard_of[windows], self.starts[windows]

    def __getitem__(self, windows: list[int]) -> Batch:
        B, T = len(windows), self.block_size
        places = zip(self.shard_of[windows], self.starts[windows], strict=True)
        cut = np.stack([self.shards[shard][start : start + T + 1] for shard, start in places])
        ids = torch.from_numpy(cut.astype(np.int64))  # (B, T + 1)
        return Batch(
            prefix=ids.new_empty(0),
            ids=ids[:, :-1].contiguous(),
            trained_at=torch.arange(B * T),
            targets=ids[:, 1:].flatten(),
            rows=list(windows),
            lengths=[T] * B,
        )


def cut_windows(
    num_tokens: int, block_size: int, *, weight: float, random: np.random.Generator
) -> np.ndarray:
    """Starts of windows that together read every token `weight` times.

    Each pass cuts the text anew, at a random offset; a fraction of a pass is a random choice of
    its windows. What is shorter than a window, at either end of a pass, is left out.
    """
    starts = []
    for num_passes in range(math.ceil(weight)):
        once = np.arange(random.integers(block_size), num_tokens - block_size, block_size)
        share = min(1.0, weight - num_passes)
        starts.append(random.permutation(once)[: round(share * len(once))])
    return np.concatenate(starts)


class TextDataModule(L.LightningDataModule):
    """Random windows of text files, to pre-train on; validation reads its files from the start.

    Args:
        text_files: training files, each with how often an epoch reads it: 2 for twice, 0.5 for
            half of it, chosen at random. Text (.txt, .txt.xz) or token shards (.bin).
        val_files: validation files.
        batch_size: windows a batch and device.
        block_size: tokens a window; without one, the model's own.
        num_workers: processes that prepare batches. 128 windows of 512 take 0.3 ms, so 0 will do.
        shard_dir: where token shards of text files are kept; without one, the cache folder
            ($FC_LIGHTNING_CACHE, or ~/.cache/fc_lightning).
        seed: of where the text is cut, and of the order of windows.
    """

    def __init__(
        self,
        text_files: dict[str, float],
        val_files: list[str],
        batch_size: int = 128,
        block_size: int | None = None,
        num_workers: int = 0,
        shard_dir: str | None = None,
        seed: int = 1337,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, not {batch_size}")
        for file, weight in text_files.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"data.text_files: {file} needs a weight above 0, not {weight}")
        self.weights: Mapping[Path, float] = {Path(file): w for file, w in text_files.items()}
        self.val_files = [Path(file) for file in val_files]
        self.batch_size, self.block_size, self.num_workers = batch_size, block_size, num_workers
        self.shard_dir = Path(shard_dir) if shard_dir is not None else cache_folder()
        self.seed = seed
        self.train_set: TextWindows | None = None
        self.val_set: TextWindows | None = None

    def prepare_data(self) -> None:
        """Tokenize what isn't yet, or has changed since.

        Raises:
            DataError: a file can't be read, or holds no text.
        """
        for file in [*self.weights, *self.val_files]:
            shard = self._shard(file)
            if not shard.is_file():
                write_shard(file, shard)
                rank_zero_info(f"{file}: {shard.stat().st_size // 2:,} tokens, kept in {shard}")

    def setup(self, stage: str) -> None:
        """Map the shards and cut them into windows.

        Raises:
            DataError: a file has too few tokens for a single window.
        """
        if stage == "fit" and self.train_set is None:
            random = np.random.default_rng(self.seed)
            shards = [self._tokens(file) for file in self.weights]
            starts = [
                cut_windows(len(shard), self._window_size(), weight=weight, random=random)
                for shard, weight in zip(shards, self.weights.values(), strict=True)
            ]
            self.train_set = TextWindows(shards, starts, block_size=self._window_size())
            # Full batches only: a smaller last one would be compiled once more.
            batch = self.batch_size * (self.trainer.world_size if self.trainer else 1)
            num_kept = len(self.train_set) // batch * batch or len(self.train_set)
            self.train_set.keep(random.permutation(len(self.train_set))[:num_kept])
        if self.val_set is None:
            shards = [self._tokens(file) for file in self.val_files]
            size = self._window_size()
            starts = [np.arange(0, len(shard) - size, size) for shard in shards]
            self.val_set = TextWindows(shards, starts, block_size=size)

    def train_dataloader(self) -> BatchLoader:
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> BatchLoader:
        return self._loader(self.val_set, shuffle=False)

    def _shard(self, file: Path) -> Path:
        """Where the tokens of a file are; its name changes with the file's content."""
        if file.suffix == ".bin":
            return file
        if not file.is_file():
            raise DataError(f"{file}: no such file; see data.text_files and data.val_files")
        stat = file.stat()
        source = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        name = f"{file.name.split('.')[0]}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.bin"
        return self.shard_dir / name

    def _tokens(self, file: Path) -> np.ndarray:
        tokens = np.memmap(self._shard(file), dtype=np.uint16, mode="r")
        if len(tokens) < (needed := 2 * self._window_size()):
            raise DataError(
                f"{file}: {len(tokens)} tokens are too few for windows of {self._window_size()}; "
                f"give it {needed} or lower data.block_size"
            )
        return tokens

    def _window_size(self) -> int:
        model = getattr(self.trainer, "lightning_module", None)
        return self.block_size or int(getattr(model, "block_size", 1024))

    def _loader(self, dataset: TextWindows | None, *, shuffle: bool) -> BatchLoader:
        if dataset is None:
            raise RuntimeError("call setup() before asking for a data loader")
        return make_loader(
            dataset,
            np.full(len(dataset), dataset.block_size),
            trainer=self.trainer,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            num_workers=self.num_workers,
        )
