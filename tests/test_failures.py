"""Numbers that aren't finite and memory that runs out end a run in words."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException
from training import example, fit, write_rows

from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.failures import ExplainFailures, NonFiniteError, _ranges
from fc_lightning.module import FunctionCallModule


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_rows(tmp_path_factory.mktemp("data"), 10, 3)
    rows = [vars(example(i)) for i in range(100, 106)]
    (folder / "more_train.json").write_text(json.dumps(rows))
    return folder


class Poison(L.Callback):
    """Spoils the loss, or a gradient, in one training batch; remembers the rows `since` one."""

    def __init__(self, what, *, at, since=None, value=float("nan")):
        self.what, self.at, self.value = what, at, value
        self.since = at if since is None else since
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_due = trainer.fit_loop.total_batch_idx == self.at
        if self.since <= trainer.fit_loop.total_batch_idx <= self.at:
            self.rows += [trainer.datamodule.train_set.rows[row] for row in batch.rows]

    def on_before_backward(self, trainer, pl_module, loss):
        if self.is_due and self.what == "loss":
            loss.mul_(self.value)

    def on_after_backward(self, trainer, pl_module):
        if self.is_due and self.what == "gradient":
            pl_module.gpt.transformer.ln_f.weight.grad[0] = self.value


def stopped(tmp_path, data, poison, **options):
    with pytest.raises(NonFiniteError) as error:
        fit(tmp_path, data, callbacks=[poison, ExplainFailures()], max_epochs=2, **options)
    for file in {row.file for row in poison.rows}:
        numbers = [row.number for row in poison.rows if row.file == file]
        assert f"{file}: rows {_ranges(numbers)}" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_ends_the_run_with_step_and_rows(tmp_path, data, what, value):
    # Looked at every 50 batches and at an epoch's end only, and still the right batch is named.
    poison = Poison(what, at=1, value=value)
    message = stopped(tmp_path, data, poison, log_every_n_steps=50, save_every=50)
    assert message.startswith(f"step 2: the {what} is not finite in {data}/")
    assert "model.learning_rate" in message and "--ckpt_path last" in message
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_no_checkpoint_is_written_with_spoilt_weights(tmp_path, data):
    poison = Poison("loss", at=1)
    stopped(tmp_path, data, poison, log_every_n_steps=50, save_every=1)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 1
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


def test_a_gradient_is_that_of_a_whole_window(tmp_path, data):
    poison = Poison("gradient", at=1, since=0)
    message = stopped(tmp_path, data, poison, accumulate_grad_batches=2)
    assert len(poison.rows) == 8
    assert message.startswith("step 1: the gradient is not finite")


class PoisonOfRankOne(Poison):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.is_due = self.is_due and trainer.global_rank == 1
        if self.is_due:
            numbers = sorted(row.number for row in self.rows)
            Path(trainer.default_root_dir, "poisoned").write_text(str(numbers))


def test_all_ranks_stop_at_a_loss_of_one_of_them_and_name_its_rows(tmp_path):
    data = write_rows(tmp_path / "data", 13, 2)
    ranks = {"devices": 2, "strategy": "ddp_fork", "batch_size": 2, "max_epochs": 2}
    callbacks = [PoisonOfRankOne("loss", at=1), ExplainFailures()]
    with pytest.raises(ProcessRaisedException) as error:
        fit(tmp_path, data, callbacks=callbacks, log_every_n_steps=2, **ranks)
    numbers = json.loads((tmp_path / "poisoned").read_text())
    expected = f"step 2: the loss is not finite in {data}/train.json: rows {_ranges(numbers)}."
    assert expected in str(error.value)


def test_rows_are_named_in_few_words():
    assert _ranges([3, 19, 17, 18, 5, 4, 9]) == "3-5, 9, 17-19"
    assert _ranges([1, 2]) == "1-2"
    assert _ranges([7]) == "7"


class OutOfMemory(FunctionCallModule):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_out_of_memory_says_batch_longest_row_and_what_to_lower(tmp_path, data):
    module = OutOfMemory(n_layer=1, n_head=1, n_embd=8, block_size=192, lr_decay_iters=9)
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExplainFailures()],
    )
    datamodule = FunctionCallDataModule(str(data), batch_size=16)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.fit(module, datamodule)
    (note,) = error.value.__notes__
    lengths = datamodule.train_set.lengths
    longest = datamodule.train_set.rows[int(lengths.argmax())]
    assert f"16 rows in a batch, the longest of {lengths.max() - 1} tokens" in note
    assert longest.file.name in note and str(longest.number) in note
    assert "Lower data.batch_size" in note
