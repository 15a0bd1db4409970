"""Two ranks measure and predict what one process does, also where one of them has no row."""

import json

import pytest
import torch
from training import SHAPE, make_trainer, read_lines, write_rows

from fc_lightning.callbacks import SampleCalls, ValidateCalls
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.module import FunctionCallModule
from fc_lightning.ranks import gather, highest_of_ranks, share, sum_over_ranks


class Noted(FunctionCallModule):
    """Appends the rows of each validation batch to a file of its rank."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        with open(f"{self.trainer.default_root_dir}/validated-{self.global_rank}", "a") as file:
            file.write(json.dumps(batch.rows) + "\n")


def evaluate(root, data, ranks, run):
    """What `run(trainer, module, datamodule)` logs, and the rows that were validated."""
    torch.manual_seed(0)
    root.mkdir()
    callbacks = [ValidateCalls(), SampleCalls(sample_interval=1, num_samples=3)]
    trainer = make_trainer(
        root,
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        callbacks=callbacks,
        enable_checkpointing=False,
        max_steps=1,
        num_sanity_val_steps=0,
    )
    module = Noted(**SHAPE, dropout=0.0, lr_decay_iters=10)
    run(trainer, module, FunctionCallDataModule(str(data), batch_size=4 // ranks))
    rows = [row for file in root.glob("validated-*") for batch in read_lines(file) for row in batch]
    return read_lines(root / "log.jsonl"), sorted(rows)


def assert_same_measures(one, two):
    assert [sorted(line) for line in one] == [sorted(line) for line in two]
    for of_one, of_two in zip(one, two, strict=True):
        for name, value in of_one.items():
            # Sums of losses in another order; everything else is counted.
            assert of_two[name] == (pytest.approx(value, rel=1e-6) if "loss" in name else value), (
                name
            )


@pytest.mark.parametrize("num_rows", [1, 3, 7])
def test_two_ranks_validate_each_row_once_and_measure_as_one_process(tmp_path, num_rows):
    data = write_rows(tmp_path / "data", 4, num_rows)

    def validate(trainer, module, datamodule):
        trainer.validate(module, datamodule, verbose=False)

    one, rows = evaluate(tmp_path / "one", data, 1, validate)
    assert rows == list(range(num_rows))
    two, rows = evaluate(tmp_path / "two", data, 2, validate)
    assert rows == list(range(num_rows))
    assert {"val/loss", "val/call_match", "val/argument_f1"} <= set(one[0])
    assert_same_measures(one, two)


def test_two_ranks_test_as_one_process(tmp_path):
    data = write_rows(tmp_path / "data", 4, 3)

    def test(trainer, module, datamodule):
        trainer.test(module, datamodule, verbose=False)

    one, _ = evaluate(tmp_path / "one", data, 1, test)
    two, _ = evaluate(tmp_path / "two", data, 2, test)
    assert "test/call_match" in one[0]
    assert_same_measures(one, two)


def test_two_ranks_sample_and_validate_in_training_as_one_process(tmp_path):
    data = write_rows(tmp_path / "data", 4, 1)

    def fit(trainer, module, datamodule):
        trainer.fit(module, datamodule)

    one, rows = evaluate(tmp_path / "one", data, 1, fit)
    two, same_rows = evaluate(tmp_path / "two", data, 2, fit)
    assert rows == same_rows == [0]
    assert_same_measures(one, two)
    for name in ("train_sample.txt", "val_sample.txt"):
        sampled = [(tmp_path / run / "samples" / name).read_text() for run in ("one", "two")]
        assert sampled[0] == sampled[1]
        assert sampled[0].count("Input:") == (3 if "train" in name else 1)


class WritePredictions(FunctionCallModule):
    def predict_step(self, batch, batch_idx):
        lines = super().predict_step(batch, batch_idx)
        with open(f"{self.trainer.default_root_dir}/predicted-{self.global_rank}", "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        return lines


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_row_is_predicted_once(tmp_path, ranks):
    data = write_rows(tmp_path / "data", 4, 3)
    strategy = "ddp_fork" if ranks > 1 else "auto"
    trainer = make_trainer(tmp_path, devices=ranks, strategy=strategy)
    datamodule = FunctionCallDataModule(str(data), batch_size=2)
    trainer.predict(WritePredictions(**SHAPE), datamodule, return_predictions=ranks == 1)
    predicted = [line for file in tmp_path.glob("predicted-*") for line in read_lines(file)]
    assert sorted(line["row"] for line in predicted) == [0, 1, 2]
    first = next(line for line in predicted if line["row"] == 0)
    assert first["file"] == str(data / "test.json")
    assert first["command"] == "play song 1000"
    assert first["expected"] == {"name": "play_music", "arguments": {"track": "song 1000"}}


def test_a_process_alone_shares_with_nobody():
    assert share([1, 2, 3]) == [1, 2, 3]
    assert gather("mine") == ["mine"]
    assert highest_of_ranks(3) == 3
    assert sum_over_ranks(torch.tensor(3)) == 3
