"""Weights out: nanoGPT's ckpt.pt, Hugging Face's GPT-2 folder, one small file to ship.

Reading them back is checkpoint.py's business. Nothing is overwritten, and nothing half written
ever has the target's name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fc_lightning.checkpoint import (
    CONV1D,
    HEAD,
    HF_FILE,
    HF_GPT2,
    NANOGPT_FILE,
    WPE,
    WTE,
    CheckpointError,
    load_gpt,
    load_registry_source,
)
from fc_lightning.gpt import GPT, GPTConfig
from fc_lightning.tokenizer import END_OF_TEXT

FORMATS = ("nanogpt", "hf", "base-bf16", "base-int8")


def export(checkpoint: str | Path, *, format: str, output: str | Path) -> Path:
    """Read any checkpoint and write it for nanoGPT, for transformers ("hf"), or to ship as a base.

    Returns the file or folder written. A fine-tuned model's registry of functions stays behind,
    with a warning. A base keeps GPT-2's 50,257 rows only: text has trained no others, and
    `load_gpt` gives them a neutral start.

    Raises:
        CheckpointError: the checkpoint can't be read, or the output exists or can't be written.
        ValueError: an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    model = load_gpt(checkpoint)
    if load_registry_source(checkpoint) is not None:
        warnings.warn(
            f"{output}: the functions of {checkpoint} are not written into it; whoever calls it "
            "names their YAML file, with --functions",
            stacklevel=2,
        )
    match format:
        case "nanogpt":
            return save_nanogpt(model, output)
        case "hf":
            return save_hf(model, output)
        case "base-int8":
            return save_packed(model, output, dtype="int8", vocab_size=END_OF_TEXT + 1)
    return save_packed(model, output, dtype="bf16", vocab_size=END_OF_TEXT + 1)


def save_nanogpt(model: GPT, path: str | Path) -> Path:
    """Write a checkpoint that nanoGPT's sample.py reads and its train.py resumes from.

    `path` is the file if it ends with .pt, else the folder for a ckpt.pt; returns the file.
    nanoGPT knows the exact GELU only: a tanh model is written with a warning, and with a note
    beside `model_args` (nanoGPT rejects unknown keys inside) by which `load_gpt` restores it.

    Raises:
        CheckpointError: the file exists or can't be written.
    """
    path = Path(path)
    file = path if path.suffix == ".pt" else path / NANOGPT_FILE
    model_args = dataclasses.asdict(model.config)
    if (gelu := model_args.pop("gelu")) == "tanh":
        warnings.warn(
            f"{file}: nanoGPT computes the exact GELU, this model was trained with the tanh form; "
            "nanoGPT's logits will differ slightly",
            stacklevel=2,
        )
    content = {
        "model": _cpu_weights(model),
        "optimizer": _fresh_optimizer(model),
        "model_args": model_args,
        "iter_num": 0,
        "best_val_loss": 1e9,  # nanoGPT's own start
        "config": {},
        "gelu": gelu,
    }
    with _appearing_whole(file) as partial:
        torch.save(content, partial)
    return file


def save_hf(model: GPT, path: str | Path) -> Path:
    """Write a folder for `transformers.GPT2LMHeadModel.from_pretrained`; returns the folder.

    transformers' GPT-2 always has biases; a model without any gets zeros, which change nothing.

    Raises:
        CheckpointError: the folder holds something or can't be written.
    """
    weights = _cpu_weights(model)
    weights.pop(HEAD)  # tied
    for name in [n for n in weights if n not in (WTE, WPE)]:
        weight = weights[name]
        if name.endswith(".weight"):
            weights.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(len(weight)))
        weights[name] = weight.t().contiguous() if name.endswith(CONV1D) else weight
    with _appearing_whole(Path(path)) as partial:
        partial.mkdir()
        (partial / HF_FILE).write_text(json.dumps(_hf_config(model.config), indent=2) + "\n")
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    return Path(path)


def save_packed(
    model: GPT, path: str | Path, *, dtype: Literal["bf16", "int8"], vocab_size: int | None = None
) -> Path:
    """Write nanoGPT's names and the shape to one small .safetensors file; returns the file.

    "int8" keeps matrices as 8-bit rows with a scale each: half of bf16's size, at about 0.7 % of
    a row's spread. With a `vocab_size`, only so many rows of the vocabulary are kept.

    Raises:
        CheckpointError: the file exists or can't be written.
    """
    weights = _cpu_weights(model)
    weights.pop(HEAD)  # tied
    config = dataclasses.asdict(model.config)
    config["vocab_size"] = vocab_size or config["vocab_size"]
    weights[WTE] = weights[WTE][: config["vocab_size"]]
    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if dtype == "bf16" or weight.ndim < 2:
            packed[name] = weight.to(torch.bfloat16)
        else:
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127  # (rows, 1)
            packed[name] = (weight / scale).round().to(torch.int8)
            packed[f"{name}.scale"] = scale
    with _appearing_whole(Path(path)) as partial:
        save_file(packed, partial, metadata={"gpt_config": json.dumps(config)})
    return Path(path)


def _cpu_weights(model: GPT) -> dict[str, Tensor]:
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    return weights | {WTE: weights[HEAD]}  # one storage on disk too


def _fresh_optimizer(model: GPT) -> dict[str, Any]:
    """The state of nanoGPT's AdamW before its first step, without which train.py can't resume."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()


def _hf_config(config: GPTConfig) -> dict[str, Any]:
    activation = "gelu_new" if config.gelu == "tanh" else "gelu"
    dropout = {f"{place}_pdrop": config.dropout for place in ("attn", "embd", "resid")}
    sizes = {key: getattr(config, key) for key in ("n_embd", "n_head", "n_layer", "vocab_size")}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **HF_GPT2,
        **sizes,
        **dropout,
        "n_positions": config.block_size,
        "activation_function": activation,
        "tie_word_embeddings": True,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
    }


@contextmanager
def _appearing_whole(target: Path) -> Iterator[Path]:
    """A path to write a new file or folder at, which takes the target's name only when whole."""
    is_empty_folder = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty_folder:
        raise CheckpointError(f"{target}: exists; remove it or name another output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            yield (partial := Path(folder) / target.name)
            os.replace(partial, target)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch's for a full disk is RuntimeError
        raise CheckpointError(f"{target}: can't be written ({error})") from None
