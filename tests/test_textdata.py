"""Text files to shards, windows and batches, and pre-training on them that can be resumed."""

from __future__ import annotations

import functools
import lzma
import os

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch._dynamo.testing import CompileCounterWithBackend

from fc_lightning import cli
from fc_lightning.dataset import DataError
from fc_lightning.module import FunctionCallModule, _compiled
from fc_lightning.textdata import TextDataModule, TextWindows, cut_windows, read_documents
from fc_lightning.tokenizer import get_encoding

TEXT = "Open the window.\n\nPlease.\n<|endoftext|>\nA <|endoftext|> inside.\n<|endoftext|>\n\nLast."
DOCUMENTS = ["Open the window.\n\nPlease.", "A <|endoftext|> inside.", "Last."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FC_LIGHTNING_CACHE", str(tmp_path / "cache"))


def shard(tmp_path, num_tokens, *, first=0, name="tokens.bin"):
    """A shard whose ids count up, so that every window says where it was cut."""
    ids = np.arange(first, first + num_tokens, dtype=np.uint16)
    (tmp_path / name).write_bytes(ids.tobytes())
    return str(tmp_path / name)


def module(**options):
    torch.manual_seed(0)
    return FunctionCallModule(
        n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.0, warmup_iters=1,
        lr_decay_iters=6, optimizer="muon", lr_schedule="trapezoid", learning_rate=0.01,
        min_lr=0.0, **options,
    )  # fmt: skip


# ---------------------------------------------------------------- text -> shards


@pytest.mark.parametrize(("name", "opened"), [("a.txt", open), ("a.txt.xz", lzma.open)])
def test_documents_end_at_a_line_with_only_the_marker(tmp_path, name, opened):
    with opened(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(TEXT)
    assert list(read_documents(tmp_path / name)) == DOCUMENTS


def test_documents_without_text_are_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>\n<|endoftext|>\nOne.\n<|endoftext|>\n\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["One."]


def test_a_shard_holds_each_document_and_50256_after_it(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    TextDataModule({str(file): 1}, [], shard_dir=str(tmp_path / "shards")).prepare_data()
    (written,) = (tmp_path / "shards").iterdir()
    ids = [i for text in DOCUMENTS for i in [*get_encoding().encode_ordinary(text), 50256]]
    assert np.fromfile(written, dtype=np.uint16).tolist() == ids


def test_text_is_tokenized_once_and_again_when_it_changes(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("One.")
    data = TextDataModule({str(file): 1}, [str(file)])
    data.prepare_data()
    (first,) = (tmp_path / "cache").iterdir()
    written_at = first.stat().st_mtime_ns
    data.prepare_data()
    assert [first] == list((tmp_path / "cache").iterdir())
    assert first.stat().st_mtime_ns == written_at
    file.write_text("Two.")
    os.utime(file, ns=(1, 1))
    data.prepare_data()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8 text \(invalid start byte at byte 0\)"),
        ("a.txt", b"\n", r"a\.txt: holds no text"),
        ("a.txt.xz", b"no xz", r"a\.txt\.xz: damaged \(.*\); copy it again"),
        ("a.txt.xz", lzma.compress(b"text" * 999)[:-20], r"a\.txt\.xz: damaged"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        TextDataModule({str(tmp_path / name): 1}, []).prepare_data()
    assert not list((tmp_path / "cache").iterdir())


def test_missing_files_and_weights_that_read_nothing_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: no such file; see data\.text_files"):
        TextDataModule({"gone.txt": 1}, []).prepare_data()
    with pytest.raises(ValueError, match=r"a\.txt needs a weight above 0, not -1"):
        TextDataModule({"a.txt": -1}, [])
    data = TextDataModule({shard(tmp_path, 15): 1}, [], block_size=8)
    with pytest.raises(DataError, match=r"15 tokens are too few for windows of 8; give it 16"):
        data.setup("fit")


# ---------------------------------------------------------------- shards -> windows


def test_a_window_is_trained_on_every_next_token():
    shards = [np.arange(10, dtype=np.uint16), np.arange(100, 110, dtype=np.uint16)]
    windows = TextWindows(shards, [np.array([0, 6]), np.array([2])], block_size=3)
    batch = windows[[2, 1]]
    assert batch.prefix.tolist() == []
    assert batch.ids.tolist() == [[102, 103, 104], [6, 7, 8]]
    assert batch.targets.tolist() == [103, 104, 105, 7, 8, 9]
    assert batch.trained_at.tolist() == [0, 1, 2, 3, 4, 5]
    assert (batch.rows, batch.lengths, batch.num_tokens) == ([2, 1], [3, 3], 6)


def test_one_pass_reads_no_token_twice_and_leaves_out_less_than_two_windows():
    starts = np.sort(cut_windows(1003, 10, weight=1, random=np.random.default_rng(0)))
    assert set(np.diff(starts)) == {10}
    assert 0 <= starts[0] < 10 and 993 - 10 <= starts[-1] < 993


def test_each_pass_is_cut_anew_and_a_fraction_reads_some_windows():
    starts = cut_windows(100_001, 10, weight=2.25, random=np.random.default_rng(0))
    assert len(starts) == pytest.approx(2.25 * 10_000, abs=3)
    assert len({int(start) % 10 for start in starts}) == 3
    assert len(np.unique(starts)) == len(starts)


def test_batches_mix_files_by_weight_and_are_all_full(tmp_path):
    weights = {
        shard(tmp_path, 4001, name="a.bin"): 3,
        shard(tmp_path, 4001, first=10_000, name="b.bin"): 1,
    }
    data = TextDataModule(weights, [], batch_size=32, block_size=10)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert {batch.ids.shape for batch in batches} == {(32, 10)}
    share = np.mean([float((batch.ids < 10_000).double().mean()) for batch in batches])
    assert share == pytest.approx(0.75, abs=0.01)
    assert 0.4 < (batches[0].ids < 10_000).double().mean() < 1  # mixed within a batch too


def test_validation_reads_windows_in_order_from_the_start(tmp_path):
    data = TextDataModule({}, [shard(tmp_path, 35)], batch_size=2, block_size=10)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [batch.ids[:, 0].tolist() for batch in batches] == [[0, 10], [20]]


def test_the_seed_alone_sets_windows_and_order(tmp_path):
    file = shard(tmp_path, 2000)

    def order(seed):
        data = TextDataModule({file: 1.5}, [], batch_size=16, block_size=8, seed=seed)
        data.setup("fit")
        return [batch.ids.tolist() for batch in data.train_dataloader()]

    assert order(1) == order(1)
    assert order(1) != order(2)


# ---------------------------------------------------------------- pre-training


def test_loss_of_text_is_the_mean_cross_entropy_of_all_positions(tmp_path):
    data = TextDataModule({shard(tmp_path, 200): 1}, [], batch_size=4, block_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = module()
    expected = F.cross_entropy(model.gpt(batch.ids).flatten(0, 1), batch.targets, reduction="sum")
    torch.testing.assert_close(model.loss_sum(batch), expected)


def test_compiled_training_is_one_graph_with_the_same_gradients(tmp_path, monkeypatch):
    # Without generated code, which would take a C++ compiler and half a minute.
    compiler = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    _compiled.cache_clear()
    data = TextDataModule({shard(tmp_path, 200): 1}, [], batch_size=4, block_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    plain, compiled = module(), module(compile=True)
    for model in (plain, compiled):
        model.loss_sum(batch).backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, msg=name)
    assert compiler.frame_count == 1
    compiled.eval().loss_sum(batch)
    assert compiler.frame_count == 1  # evaluation is not compiled
    _compiled.cache_clear()


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    def fit(ckpt_path=None):
        data = TextDataModule({shard(tmp_path, 400): 1}, [], batch_size=4, block_size=8)
        model = module()
        saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        run = L.Trainer(
            accelerator="cpu", max_steps=6, callbacks=saved, logger=False, limit_val_batches=0,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        run.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return model

    unbroken = fit()
    resumed = fit(tmp_path / "step=4.ckpt")
    for (name, p), q in zip(unbroken.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_fit_pre_trains_when_it_is_given_text_files(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("Open the window, please.\n<|endoftext|>\n" * 40)
    config = tmp_path / "text.yaml"
    config.write_text(
        f"data: {{text_files: {{{tmp_path}/a.txt: 1}}, val_files: [{tmp_path}/a.txt]}}"
    )
    args = {
        "config": config, "trainer.default_root_dir": tmp_path / "out", "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu", "data.batch_size": 8, "model.n_layer": 1,
        "model.n_head": 1, "model.n_embd": 8, "model.block_size": 8, "samples.sample_interval": 1,
    }  # fmt: skip
    cli.main(["fit", *(f"--{name}={value}" for name, value in args.items())])
    assert (tmp_path / "out" / "checkpoints" / "best.ckpt").is_file()
    assert not (tmp_path / "out" / "samples").exists()
    assert "fit --model.pretrained_dir" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no option --data\.fc_data_dir"):
        cli.main(["fit", f"--config={config}", "--data.fc_data_dir=x"])
