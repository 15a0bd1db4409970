"""Checkpoints out, against nanoGPT's own model and transformers' own loader."""

import dataclasses
from pathlib import Path

import pytest
import torch
from checkpoints import (
    SHAPE,
    assert_same_logits,
    logits,
    nanogpt_checkpoint,
    nanogpt_resumed,
    our_gpt,
    saved,
)
from safetensors.torch import load_file

from fc_lightning.checkpoint import CheckpointError, load_gpt, load_registry_source
from fc_lightning.export import export, save_hf, save_nanogpt, save_packed
from fc_lightning.gpt import GPT, GPTConfig


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpts_own_code_loads_what_is_exported_strictly(tmp_path, bias):
    model = our_gpt(bias=bias, dropout=0.1)
    file = save_nanogpt(model, tmp_path / "out")
    assert file == tmp_path / "out" / "ckpt.pt"
    assert_same_logits(logits(nanogpt_resumed(file)), logits(model))
    assert load_gpt(file).config == model.config
    assert torch.equal(logits(load_gpt(file)), logits(model))


def test_the_tied_matrix_is_written_once(tmp_path):
    model = our_gpt(vocab_size=10_000)
    file = save_nanogpt(model, tmp_path / "model.pt")
    assert file == tmp_path / "model.pt"
    assert file.stat().st_size < 4 * model.num_parameters() + 40_000


def test_a_tanh_model_warns_on_its_way_to_nanogpt_and_comes_back_whole(tmp_path):
    model = our_gpt(gelu="tanh")
    with pytest.warns(UserWarning, match="nanoGPT computes the exact GELU"):
        file = save_nanogpt(model, tmp_path / "ckpt.pt")
    difference = (logits(nanogpt_resumed(file)) - logits(model)).abs().max()
    assert 1e-6 < difference < 0.05
    assert torch.equal(logits(load_gpt(file)), logits(model))


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_transformers_loads_what_is_exported_with_equal_logits(tmp_path, bias, gelu):
    transformers = pytest.importorskip("transformers")
    model = our_gpt(bias=bias, gelu=gelu, dropout=0.1)
    folder = save_hf(model, tmp_path / "hf")
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    assert_same_logits(logits(theirs), logits(model))
    assert theirs.config.resid_pdrop == 0.1
    again = load_gpt(folder)
    assert again.config == dataclasses.replace(model.config, bias=True)
    assert_same_logits(logits(again), logits(model))


@pytest.mark.parametrize(("dtype", "largest_error"), [("bf16", 2**-8), ("int8", 0.5 / 127)])
def test_packed_file_holds_every_weight_to_its_precision(tmp_path, dtype, largest_error):
    model = our_gpt()
    file = save_packed(model, tmp_path / "small.safetensors", dtype=dtype)
    read = load_gpt(file)
    assert read.config == model.config
    for name, weight in model.state_dict().items():
        row_largest = weight.abs().amax(-1, keepdim=True)
        assert (
            (read.state_dict()[name] - weight).abs() <= row_largest * largest_error * 1.001
        ).all()
    assert load_registry_source(file) is None


def test_packed_matrices_take_one_byte_a_weight_as_int8(tmp_path):
    model = our_gpt()
    file = save_packed(model, tmp_path / "small.safetensors", dtype="int8")
    stored = load_file(file)
    num_bytes = sum(t.numel() for name, t in stored.items() if t.dtype == torch.int8)
    assert num_bytes == sum(p.numel() for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("format", ["base-bf16", "base-int8"])
def test_exported_base_gives_special_tokens_the_mean_row(tmp_path, format):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | {"vocab_size": 50304, "bias": False}))
    checkpoint = save_nanogpt(model, tmp_path / "ckpt.pt")
    file = export(checkpoint, format=format, output=tmp_path / "base.safetensors")
    wte = load_gpt(file).transformer.wte.weight
    assert wte.shape == (50304, 8)
    torch.testing.assert_close(wte[50258], wte[:50257].mean(0))


@pytest.mark.parametrize(("format", "written"), [("nanogpt", "ckpt.pt"), ("hf", "config.json")])
def test_export_writes_any_checkpoint_in_any_format(tmp_path, format, written):
    file = saved(nanogpt_checkpoint(), tmp_path / "ckpt.pt")
    export(file, format=format, output=tmp_path / "out")
    assert (tmp_path / "out" / written).is_file()
    assert_same_logits(logits(load_gpt(tmp_path / "out")), logits(load_gpt(file)))
    with pytest.raises(ValueError, match="format must be one of nanogpt, hf"):
        export(file, format="onnx", output=tmp_path / "onnx")


def test_functions_that_stay_behind_are_told(tmp_path):
    file = saved(nanogpt_checkpoint() | {"registry": {"functions": []}}, tmp_path / "ckpt.pt")
    with pytest.warns(UserWarning, match=r"out: the functions of .*ckpt\.pt are not written"):
        export(file, format="hf", output=tmp_path / "out")


@pytest.mark.parametrize("save", [save_nanogpt, save_hf])
def test_nothing_is_overwritten_and_an_empty_folder_is_filled(tmp_path, save):
    (tmp_path / "out").mkdir()
    written = save(our_gpt(), tmp_path / "out")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(CheckpointError, match="exists; remove it or name another output"):
        save(our_gpt(), written)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(
    ("save", "writer"),
    [(save_nanogpt, "torch.save"), (save_hf, "fc_lightning.export.save_file")],
)
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch, save, writer):
    def half_written(_, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left")

    monkeypatch.setattr(writer, half_written)
    with pytest.raises(CheckpointError, match=r"out.*can't be written .*no space left"):
        save(our_gpt(), tmp_path / "out")
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


def test_an_output_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        save_nanogpt(our_gpt(), tmp_path / "file" / "ckpt.pt")
