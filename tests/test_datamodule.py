"""Which data serves which stage, and what is said about rows that don't fit."""

import json
from types import SimpleNamespace

import pytest
from training import example, write_rows

from fc_lightning.calls import FunctionCall
from fc_lightning.chat import make_example
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.dataset import DataError


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data", 10, 3)


def test_train_files_are_for_fit_and_test_files_for_all_stages(data):
    datamodule = FunctionCallDataModule(str(data), batch_size=4)
    datamodule.setup("validate")
    assert datamodule.train_set is None and len(datamodule.val_set) == 3
    datamodule.setup("fit")
    assert len(datamodule.train_set) == 10
    seen = [row for batch in datamodule.train_dataloader() for row in batch.rows]
    assert sorted(seen) == list(range(10)) != seen
    for loader in (datamodule.val_dataloader, datamodule.test_dataloader):
        lengths = [int(datamodule.val_set.lengths[row]) for batch in loader() for row in batch.rows]
        assert lengths == sorted(lengths)


def test_a_budget_of_tokens_counts_padding_and_not_the_shared_prefix(data):
    datamodule = FunctionCallDataModule(
        str(data), batch_size=None, max_tokens=300, pad_to_multiple_of=16
    )
    datamodule.setup("fit")
    batches = list(datamodule.train_dataloader())
    assert sorted(row for batch in batches for row in batch.rows) == list(range(10))
    assert max(batch.ids.numel() for batch in batches) <= 300
    assert max(batch.num_tokens for batch in batches) > 300  # the prefix in every row


def test_a_row_longer_than_a_budget_of_tokens_is_refused(data):
    datamodule = FunctionCallDataModule(str(data), batch_size=None, max_tokens=20)
    datamodule.setup("fit")
    with pytest.raises(DataError, match=r"max_tokens 20 is less than the \d+ of the longest row"):
        datamodule.train_dataloader()


def test_a_loader_needs_a_setup(data):
    with pytest.raises(RuntimeError, match=r"call setup\(\)"):
        FunctionCallDataModule(str(data)).train_dataloader()


@pytest.mark.parametrize("is_canonical", [True, False])
def test_calls_are_rewritten_in_canonical_order_or_left_as_they_are(tmp_path, is_canonical):
    call = FunctionCall("set_temperature", {"area": ["rear-left", "driver"], "temperature": 21.0})
    rows = [vars(make_example("21 degrees for us", call))]
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    datamodule = FunctionCallDataModule(str(tmp_path), canonical_targets=is_canonical)
    datamodule.setup("fit")
    written = "'temperature': 21, 'area': ['driver', 'rear-left']"
    assert (written in datamodule.train_set.rows[0].example.assistant) == is_canonical


def test_rows_that_are_too_long_are_reported_by_file_row_and_length(data):
    datamodule = FunctionCallDataModule(str(data))
    datamodule.setup("fit")
    lengths = datamodule.train_set.lengths - 1
    longest = int(lengths.argmax())
    block_size = sorted(lengths)[-2]
    datamodule = FunctionCallDataModule(str(data), block_size=int(block_size))
    with pytest.warns(UserWarning, match="longer than block_size") as warnings:
        datamodule.setup("fit")
    said = "\n".join(str(warning.message) for warning in warnings)
    assert f"{data}/train.json: row {longest}: {lengths[longest]} tokens" in said
    assert len(datamodule.train_set) == 9


def test_a_block_that_no_row_fits_is_refused(data):
    with pytest.raises(DataError, match="every row is longer than block_size 20"):
        FunctionCallDataModule(str(data), block_size=20).setup("validate")


def test_the_models_positions_are_the_limit(data):
    datamodule = FunctionCallDataModule(str(data), block_size=300)
    datamodule.trainer = SimpleNamespace(lightning_module=SimpleNamespace(block_size=256))
    with pytest.raises(ValueError, match=r"data\.block_size 300 exceeds the model's 256 positions"):
        datamodule.setup("validate")


def test_a_call_that_is_unreadable_or_unknown_is_an_error_with_file_and_row(data):
    rows = [vars(example(0)), vars(make_example("fly", FunctionCall("fly", {})))]
    (data / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"train\.json: row 1: function 'fly' is not in the"):
        FunctionCallDataModule(str(data)).setup("fit")
    rows[1]["assistant"] = "no call at all"
    (data / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"train\.json: row 1: no readable call"):
        FunctionCallDataModule(str(data)).setup("fit")


def test_without_a_folder_examples_are_synthesized_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FC_LIGHTNING_CACHE", str(tmp_path))
    datamodule = FunctionCallDataModule(num_examples=300, seed=5)
    datamodule.prepare_data()
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    assert written
    FunctionCallDataModule(num_examples=300, seed=5).prepare_data()
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")} == written
    assert FunctionCallDataModule(num_examples=300, seed=6).folder != datamodule.folder
    datamodule.setup("fit")
    assert len(datamodule.train_set) + len(datamodule.val_set) == 300


def test_wrong_settings_are_refused(tmp_path):
    for options, words in (
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": None, "max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"batch_size": None}, "batch_size and data.max_tokens are both null; set one of them"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, not 0"),
        ({"max_tokens": 9}, "batch_size 64 and data.max_tokens 9 both limit a batch; set one of"),
    ):
        with pytest.raises(ValueError, match=f"data.{words}"):
            FunctionCallDataModule(**options)
    with pytest.raises(DataError, match="no such folder"):
        FunctionCallDataModule(str(tmp_path / "none")).setup("fit")
