"""Checkpoints in, against nanoGPT's own model and transformers' own loader."""

import dataclasses
import json
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    IDS,
    REFERENCES,
    SHAPE,
    assert_same_logits,
    hf_model,
    logits,
    nanogpt_checkpoint,
    our_gpt,
    reference_logits,
    saved,
)
from safetensors.torch import load_file, save_file

from fc_lightning.checkpoint import CheckpointError, load_gpt, load_registry_source
from fc_lightning.export import save_hf
from fc_lightning.functions import load_registry, registry_from_source
from fc_lightning.gpt import GPTConfig

# ---------------------------------------------------------------- nanoGPT in


@pytest.mark.parametrize("bias", [False, True])
def test_a_nanogpt_checkpoint_has_nanogpts_logits(tmp_path, bias):
    checkpoint = nanogpt_checkpoint(bias=bias)
    saved(checkpoint, tmp_path / "ckpt.pt")
    from_file, from_folder = load_gpt(tmp_path / "ckpt.pt"), load_gpt(str(tmp_path))
    assert from_file.config == GPTConfig(**SHAPE, dropout=0.1, bias=bias, gelu="exact")
    assert_same_logits(logits(from_file), reference_logits(checkpoint))
    assert torch.equal(logits(from_file), logits(from_folder))
    assert from_file.transformer.wte.weight is from_file.lm_head.weight


def test_dropout_and_block_size_can_be_changed(tmp_path):
    checkpoint = nanogpt_checkpoint()
    model = load_gpt(saved(checkpoint, tmp_path / "ckpt.pt"), dropout=0.3, block_size=7)
    assert (model.config.dropout, model.config.block_size) == (0.3, 7)
    assert model.transformer.drop.p == 0.3
    assert_same_logits(logits(model, IDS[:, :7]), reference_logits(checkpoint)[:, :7])
    assert load_gpt(tmp_path, dropout=0.0).config.dropout == 0.0


def test_a_block_size_beyond_the_checkpoints_names_both(tmp_path):
    saved(nanogpt_checkpoint(), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="block_size 13 exceeds the checkpoint's 12 positions"):
        load_gpt(tmp_path, block_size=13)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module._orig_mod."]
)
def test_names_wrapped_by_compile_and_ddp_are_read(tmp_path, prefix):
    checkpoint = nanogpt_checkpoint()
    expected = reference_logits(checkpoint)
    checkpoint["model"] = {prefix + name: w for name, w in checkpoint["model"].items()}
    assert_same_logits(logits(load_gpt(saved(checkpoint, tmp_path / "ckpt.pt"))), expected)


@pytest.mark.parametrize("left_out", ["lm_head.weight", "transformer.wte.weight"])
def test_the_tied_head_may_stand_under_either_name_alone(tmp_path, left_out):
    checkpoint = nanogpt_checkpoint()
    expected = reference_logits(checkpoint)
    del checkpoint["model"][left_out]
    assert_same_logits(logits(load_gpt(saved(checkpoint, tmp_path / "ckpt.pt"))), expected)


def test_what_descendants_of_nanogpt_add_does_no_harm(tmp_path):
    checkpoint = nanogpt_checkpoint()
    expected = reference_logits(checkpoint)
    checkpoint["model_args"] |= {"is_regression": False, "block_size": 1024, "flash": True}
    del checkpoint["model_args"]["bias"]  # the first nanoGPT had no such choice
    for layer in range(2):
        checkpoint["model"][f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        checkpoint["model"][f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    model = load_gpt(saved(checkpoint, tmp_path / "ckpt.pt"))
    assert model.config.block_size == 12  # the weights decide
    assert_same_logits(logits(model), expected)


def test_a_checkpoint_in_bfloat16_and_in_the_format_before_torch_1_6_is_read(tmp_path):
    checkpoint = nanogpt_checkpoint()
    checkpoint["model"] = {n: w.bfloat16() for n, w in checkpoint["model"].items()}
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    model = load_gpt(tmp_path)
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    checkpoint["model"] = {n: w.float() for n, w in checkpoint["model"].items()}
    assert_same_logits(logits(model), reference_logits(checkpoint))


def test_loading_draws_no_random_number_and_leaves_the_file_alone(tmp_path):
    file = saved(nanogpt_checkpoint(), tmp_path / "ckpt.pt")
    before, content = torch.get_rng_state(), file.read_bytes()
    model = load_gpt(file)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert file.read_bytes() == content


def test_a_vocabulary_of_50257_is_padded_with_rows_that_never_win(tmp_path):
    shape = {"vocab_size": 50257, "n_layer": 1, "n_embd": 4}
    checkpoint = nanogpt_checkpoint(**shape)
    # GPT-2's own logits lie far below zero, where a row of zeros would win.
    checkpoint["model"]["transformer.ln_f.bias"].fill_(-10.0)
    checkpoint["model"]["lm_head.weight"].add_(1.0)
    known = reference_logits(checkpoint)
    padded = logits(load_gpt(saved(checkpoint, tmp_path / "ckpt.pt")))
    assert padded.shape[-1] == 50304
    assert known.max() < -1
    assert_same_logits(padded[..., :50257], known)
    # The mean of a row's 50,257 logits, added up in another order.
    torch.testing.assert_close(padded[..., 50258], known.mean(-1), rtol=1e-3, atol=1e-3)
    assert bool((padded.argmax(-1) < 50257).all())


@pytest.mark.parametrize("name", ["nanogpt", "gpt2_hf"])
def test_the_reference_checkpoints_match_their_logits(name):
    folder = REFERENCES / name
    if not folder.is_dir():
        pytest.skip("the reference checkpoints are not beside this repository")
    reference = load_file(folder / "reference.safetensors")
    ours = logits(load_gpt(folder), reference["ids"])[..., : reference["logits_first"].size(1)]
    torch.testing.assert_close(ours[:, 0], reference["logits_first"], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[:, -1], reference["logits_last"], rtol=0, atol=1e-4)


# ---------------------------------------------------------------- Hugging Face in


@pytest.mark.parametrize(
    ("activation", "gelu"),
    [("gelu_new", "tanh"), ("gelu", "exact"), ("gelu_pytorch_tanh", "tanh")],
)
def test_a_hugging_face_folder_has_transformers_logits(tmp_path, activation, gelu):
    theirs = hf_model(activation_function=activation)
    theirs.save_pretrained(tmp_path)
    model = load_gpt(tmp_path)
    assert model.config == GPTConfig(**SHAPE, dropout=0.2, gelu=gelu)
    assert_same_logits(logits(model), logits(theirs))
    assert torch.equal(logits(load_gpt(tmp_path / "config.json")), logits(model))


def test_a_hugging_face_folder_is_read_in_shards_too(tmp_path):
    theirs = hf_model()
    theirs.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(logits(load_gpt(tmp_path)), logits(theirs))


def test_pytorch_model_bin_without_prefix_and_with_masks_is_read(tmp_path):
    theirs = hf_model()
    weights = theirs.transformer.state_dict()  # as OpenAI's own upload has them
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril().byte() for i in range(2)}
    weights |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    assert_same_logits(logits(load_gpt(tmp_path)), logits(theirs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only GPT-2's 'gpt2' can be read"),
        ({"activation_function": "relu"}, "activation_function 'relu' is none of gelu_new"),
        ({"n_inner": 100}, "n_inner 100 is not 4 x n_embd 8"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"n_layer": 3}, "says n_layer is 3, but its weights have 2"),
        ({"n_head": 3}, "n_embd 8 is not divisible by n_head 3"),
        ({"n_head": None}, r"must say how many heads \(n_head\), not None"),
        ({"resid_pdrop": "much"}, "config.json"),
    ],
)
def test_a_hugging_face_config_that_is_no_gpt2_is_refused(tmp_path, changes, message):
    save_hf(our_gpt(), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        load_gpt(tmp_path / "hf")


def test_an_untied_head_is_refused_unless_it_is_equal(tmp_path):
    folder = save_hf(our_gpt(), tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert_same_logits(logits(load_gpt(folder)), logits(our_gpt()))
    weights["lm_head.weight"][60, 7] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not tied to transformer\.wte"):
        load_gpt(folder)


# ---------------------------------------------------------------- our own Lightning .ckpt


@pytest.mark.parametrize("prefix", ["gpt.", "gpt._orig_mod.", "_orig_mod.gpt."])
def test_a_lightning_checkpoint_gives_the_model_and_the_registry(tmp_path, prefix):
    model = our_gpt(dropout=0.1, bias=False, gelu="tanh")
    source = load_registry().source
    checkpoint = {
        "state_dict": {prefix + name: w for name, w in model.state_dict().items()},
        "gpt_config": dataclasses.asdict(model.config),
        "registry": source,
        "optimizer_states": [],
        "ranks": [{"python": random.getstate(), "torch": torch.get_rng_state()}],
    }
    file = saved(checkpoint, tmp_path / "last.ckpt")
    assert load_gpt(file).config == model.config
    assert torch.equal(logits(load_gpt(file)), logits(model))
    assert registry_from_source(load_registry_source(file), file) == load_registry()


def test_checkpoints_of_other_programs_carry_no_registry(tmp_path):
    saved(nanogpt_checkpoint(), tmp_path / "ckpt.pt")
    save_hf(our_gpt(), tmp_path / "hf")
    assert load_registry_source(tmp_path) is None
    assert load_registry_source(tmp_path / "hf") is None


# ---------------------------------------------------------------- what can't be read


class Trap:
    """Creates a file when it is unpickled by anything that runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def spring(folder: Path, name: str, save) -> None:
    """Put a trap into a checkpoint otherwise right, and see that loading it refuses it."""
    checkpoint = nanogpt_checkpoint()
    sprung = folder / "sprung"
    content = checkpoint if name == "ckpt.pt" else checkpoint["model"]
    save(content | {"trap": Trap(sprung)}, folder / name)
    for load in (load_gpt, load_registry_source) if name == "ckpt.pt" else (load_gpt,):
        with pytest.raises(CheckpointError, match=r"never run|damaged"):
            load(folder)
    assert not sprung.exists()


@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_is_never_run(tmp_path, name):
    if name == "pytorch_model.bin":
        save_hf(our_gpt(), tmp_path / "hf")
        (tmp_path / "hf" / "config.json").rename(tmp_path / "config.json")
    spring(tmp_path, name, torch.save)
    spring(tmp_path, name, lambda c, p: torch.save(c, p, _use_new_zipfile_serialization=False))
    spring(tmp_path, name, lambda c, p: p.write_bytes(pickle.dumps(c)))


def test_the_trap_is_a_real_one(tmp_path):
    torch.save({"trap": Trap(tmp_path / "sprung")}, tmp_path / "ckpt.pt")
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_checkpoint_with_other_objects_says_which_and_what_to_do(tmp_path):
    checkpoint = nanogpt_checkpoint() | {"best_val_loss": np.float64(1.5)}
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: wants Python's numpy.*save it again"):
        load_gpt(saved(checkpoint, tmp_path / "ckpt.pt"))


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint\n", b"PK\x03\x04", b"\x80\x02}.", b"["]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt: "):
        load_gpt(tmp_path)


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    whole = saved(nanogpt_checkpoint(), tmp_path / "whole.pt").read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (tmp_path / "ckpt.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"ckpt\.pt: no checkpoint, or a damaged one"):
            load_gpt(tmp_path)


def test_a_damaged_checkpoint_is_read_or_refused_never_worse(tmp_path):
    whole = saved(nanogpt_checkpoint(), tmp_path / "whole.pt").read_bytes()
    chance = random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(20):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        try:
            load_gpt(tmp_path)
        except CheckpointError as error:
            assert str(error).count("\n") == 0 and "ckpt.pt" in str(error)


def test_truncated_safetensors_and_broken_json_are_refused(tmp_path):
    folder = save_hf(our_gpt(), tmp_path / "hf")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged; copy it again"):
        load_gpt(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors or pytorch_model\.bin"):
        load_gpt(folder)
    for broken, message in (("{", "not valid JSON"), ("[]", "must hold a JSON object")):
        (folder / "config.json").write_text(broken)
        with pytest.raises(CheckpointError, match=f"config.json: {message}"):
            load_gpt(folder)


def test_the_wrong_place_is_named_with_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone: no such file or folder"):
        load_gpt(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"neither ckpt\.pt .* in it, but nothing"):
        load_gpt(tmp_path)
    (tmp_path / "last.ckpt").write_text("")
    with pytest.raises(CheckpointError, match=r"but last\.ckpt; name the checkpoint's file"):
        load_gpt(tmp_path)
    (tmp_path / "ckpt.pt").write_text("")
    (tmp_path / "config.json").write_text("")
    with pytest.raises(
        CheckpointError, match=r"two checkpoints; name .*ckpt\.pt or .*config\.json"
    ):
        load_gpt(tmp_path)
    file = save_hf(our_gpt(), tmp_path / "hf") / "model.safetensors"
    with pytest.raises(CheckpointError, match="name the folder that holds it"):
        load_gpt(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not a checkpoint's dict"),
        ({}, "holds nothing"),
        ({"model": {}, "epoch": 3}, "needs 'model' and 'model_args'.* holds model, epoch"),
        ({"state_dict": {}, "epoch": 3}, "a Lightning checkpoint of another program"),
        ({"model": {}, "model_args": {}}, r"no GPT-2: it lacks transformer\.wte\.weight"),
        ({"model": {"transformer.wte.weight": 3}, "model_args": {}}, "must hold floats, not int"),
    ],
)
def test_a_pickled_file_of_something_else_is_refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=rf"ckpt\.pt: .*{message}"):
        load_gpt(saved(content, tmp_path / "ckpt.pt"))


def without(name):
    return lambda model, args: model.pop(name)


def with_weight(name, weight):
    return lambda model, args: model.update({name: weight})


def with_args(**changes):
    return lambda model, args: args.update(changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("transformer.h.0.ln_1.weight"), r"it lacks transformer\.h\.0\.ln_1\.weight"),
        (without("transformer.wpe.weight"), r"transformer\.wpe\.weight must both be matrices"),
        (with_weight("transformer.h.0.rotary", torch.ones(2)), "has the unknown transformer.h.0.r"),
        (with_weight("score.weight", torch.ones(2, 8)), r"has the unknown score\.weight"),
        (with_weight("transformer.h.1.mlp.c_fc.weight", torch.ones(24, 8)),
         r"c_fc\.weight has shape \(24, 8\); by its other sizes, \(32, 8\)"),
        (with_weight("lm_head.weight", torch.ones(2, 8)), "is not tied"),
        (with_weight("transformer.ln_f.weight", torch.ones(8).int()), "floats, not torch.int32"),
        (with_weight("transformer.ln_f.weight", torch.full((8,), torch.nan)), "is not finite"),
        (with_args(n_layer=12), "says n_layer is 12, but its weights have 2"),
        (with_args(n_embd=768), "says n_embd is 768, but its weights have 8"),
        (with_args(bias=False), "says bias is False, but its weights have True"),
        (with_args(n_head=3), "n_embd 8 is not divisible by n_head 3"),
        (with_args(n_head="2"), r"must say how many heads \(n_head\), not '2'"),
        (with_args(dropout="none"), "ckpt.pt"),
    ],
)  # fmt: skip
def test_a_checkpoint_at_odds_with_itself_is_refused(tmp_path, spoil, message):
    checkpoint = nanogpt_checkpoint()
    checkpoint["model"] = OrderedDict(checkpoint["model"])
    spoil(checkpoint["model"], checkpoint["model_args"])
    with pytest.raises(CheckpointError, match=message) as caught:
        load_gpt(saved(checkpoint, tmp_path / "ckpt.pt"))
    assert "ckpt.pt" in str(caught.value) and "\n" not in str(caught.value)
