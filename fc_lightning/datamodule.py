"""Which data folder serves which stage, as a LightningDataModule.

Usable on its own, without a Trainer:

    data = FunctionCallDataModule(fc_data_dir="my_data")
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from fc_lightning.chat import render_response
from fc_lightning.dataset import (
    DataError,
    FunctionCallDataset,
    Row,
    cache_folder,
    expected_call,
    read_rows,
)
from fc_lightning.functions import Registry, load_registry
from fc_lightning.loader import BatchLoader, check_batch_limit, make_loader
from fc_lightning.synthesis import write_data_folder

GPT2_BLOCK_SIZE = 1024


class FunctionCallDataModule(L.LightningDataModule):
    """Training rows from the folder's *train*.json files, validation rows from *test*.json.

    Args:
        fc_data_dir: folder of example files. Without one, examples are synthesized once from
            `functions` into a cache folder ($FC_LIGHTNING_CACHE, or ~/.cache/fc_lightning).
        batch_size: rows a batch and device; null with max_tokens.
        max_tokens: tokens a batch and device instead, padding counted, the shared prefix not:
            batches of short rows then hold more of them.
        block_size: longest row in tokens; longer ones are left out and reported. Without one,
            the model's own limit.
        num_workers: processes that prepare batches. Collating 64 rows takes 0.1 ms, so 0 is
            the fastest unless the machine's cores are idle.
        functions: the domain's YAML file; without one, the vehicle's eighteen functions.
        canonical_targets: rewrite every call with keys in schema order and arrays in enum order
            when reading, so that the model isn't asked to guess a random order.
        pad_to_multiple_of: pads batches to few lengths, for each of which a compiled model is
            compiled; 16 on a GPU. Rows are packed instead, end to end, on a GPU of 2020 or later
            with Triton, if the model's heads are at most 128 wide.
        num_examples: how many to synthesize, test rows included.
        seed: of synthesis and of the order of training rows.
    """

    def __init__(
        self,
        fc_data_dir: str | None = None,
        batch_size: int | None = 64,
        block_size: int | None = None,
        num_workers: int = 0,
        functions: str | None = None,
        canonical_targets: bool = True,
        pad_to_multiple_of: int = 1,
        num_examples: int = 25_000,
        seed: int = 1337,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        check_batch_limit(batch_size, max_tokens)
        if pad_to_multiple_of < 1:
            raise ValueError(
                f"data.pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}"
            )
        self.fc_data_dir = Path(fc_data_dir) if fc_data_dir is not None else None
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.block_size, self.num_workers = block_size, num_workers
        self.canonical_targets, self.num_examples, self.seed = canonical_targets, num_examples, seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.registry: Registry = load_registry(functions)
        self.train_set: FunctionCallDataset | None = None
        self.val_set: FunctionCallDataset | None = None

    @property
    def folder(self) -> Path:
        """Where the example files are: the user's folder, or the cache of synthesized ones."""
        if self.fc_data_dir is not None:
            return self.fc_data_dir
        content = [self.registry.source, self.num_examples, self.seed]
        source = json.dumps(content, sort_keys=True, default=str)  # YAML has dates
        return cache_folder() / f"synthesized-{hashlib.sha256(source.encode()).hexdigest()[:16]}"

    def prepare_data(self) -> None:
        """Synthesize the default examples, unless they are there or a folder was given."""
        if self.fc_data_dir is None and not self.folder.is_dir():
            partial = self.folder.with_name(f"{self.folder.name}-{os.getpid()}")
            write_data_folder(
                partial, self.registry, num_examples=self.num_examples, seed=self.seed
            )
            try:
                partial.rename(self.folder)
            except OSError:  # another process was first, with the same content
                shutil.rmtree(partial)

    def setup(self, stage: str) -> None:
        """Read and encode the rows that `stage` ("fit", "validate", "test", "predict") needs.

        Raises:
            DataError: a missing folder, file or key, or no row short enough; says where.
        """
        if stage == "fit" and self.train_set is None:
            self.train_set = self._encode(read_rows(self.folder, "train"))
        if self.val_set is None:
            self.val_set = self._encode(read_rows(self.folder, "test"))

    def train_dataloader(self) -> BatchLoader:
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> BatchLoader:
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self) -> BatchLoader:
        return self._loader(self.val_set, shuffle=False)

    def predict_dataloader(self) -> BatchLoader:
        return self._loader(self.val_set, shuffle=False)

    def _encode(self, rows: Sequence[Row]) -> FunctionCallDataset:
        calls = [expected_call(row, self.registry) for row in rows]
        if self.canonical_targets:
            rows = [
                replace(row, example=replace(row.example, assistant=render_response(call)))
                for row, call in zip(rows, calls, strict=True)
            ]
        block_size = self._block_size()
        encoded = FunctionCallDataset(
            rows, block_size=block_size, pad_to_multiple_of=self.pad_to_multiple_of
        )
        if encoded.too_long:
            shown = [f"{row.where}: {length} tokens" for row, length in encoded.too_long[:5]]
            more = len(encoded.too_long) - len(shown)
            rank_zero_warn(
                f"{len(encoded.too_long)} of {len(rows)} rows are longer than block_size "
                f"{block_size} and left out:\n  "
                + "\n  ".join(shown + ([f"... and {more} more"] if more else []))
            )
        if not len(encoded):
            raise DataError(
                f"{self.folder}: every row is longer than block_size {block_size} "
                f"(the shortest has {min(length for _, length in encoded.too_long)} tokens)"
            )
        return encoded

    def _block_size(self) -> int:
        model = getattr(self.trainer, "lightning_module", None)
        limit = getattr(model, "block_size", GPT2_BLOCK_SIZE)
        if self.block_size is not None and self.block_size > limit:
            raise ValueError(
                f"data.block_size {self.block_size} exceeds the model's {limit} positions"
            )
        return self.block_size or limit

    def _loader(self, dataset: FunctionCallDataset | None, *, shuffle: bool) -> BatchLoader:
        if dataset is None:
            raise RuntimeError("call setup() before asking for a data loader")
        model = getattr(self.trainer, "lightning_module", None)
        is_packed = getattr(model, "can_pack", False)
        return make_loader(
            dataset,
            dataset.lengths - 1 - dataset.prefix_length if is_packed else dataset.padded_lengths,
            trainer=self.trainer,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            seed=self.seed,
            shuffle=shuffle,
            num_workers=self.num_workers,
            is_packed=is_packed,
        )
