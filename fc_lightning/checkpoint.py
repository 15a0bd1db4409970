"""Weights in: nanoGPT's ckpt.pt, Hugging Face's GPT-2 folder, our Lightning .ckpt, the base.

Each reader brings its file to nanoGPT's parameter names, and one `GPT` is built from them. Files
are read as tensors and plain values only: a pickle that asks for anything else is refused, never
run. Writing (export.py), and how training saves (module.py), stand elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fc_lightning.gpt import GPT, GPTConfig
from fc_lightning.tokenizer import END_OF_TEXT, PADDED_VOCAB_SIZE

NANOGPT_FILE, HF_FILE = "ckpt.pt", "config.json"
SHIPPED = {
    name: Path(__file__).parent / "assets" / f"{name}.safetensors" for name in ("base", "vehicle")
}
WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
# GPT-2 stores these as Conv1D weights (in, out); Linear wants (out, in).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_WRAPPERS = ("_orig_mod", "module", "gpt")
_GELU_OF_ACTIVATION = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
HF_GPT2 = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


class CheckpointError(ValueError):
    """A checkpoint that can't be read or written; the message says why and what to do."""


def load_gpt(
    path: str | Path, *, dropout: float | None = None, block_size: int | None = None
) -> GPT:
    """The model of a checkpoint, in float32 on the CPU.

    Reads a nanoGPT `ckpt.pt`, a Lightning `.ckpt` of this package, a file of
    `export.save_packed`, or a folder that holds a `ckpt.pt` or a Hugging Face GPT-2 (config.json
    and model.safetensors or pytorch_model.bin). "base" is the base that ships with the package,
    "vehicle" the same after fine-tuning on synthesized commands for the built-in functions.
    A vocabulary of 50,257 is padded to 50,304 rows; see `_with_padded_vocabulary`.

    Args:
        dropout: in place of the checkpoint's own (for Hugging Face, its `resid_pdrop`).
        block_size: keep only that many positions.

    Raises:
        CheckpointError: unreadable, not a GPT-2, or at odds with itself; with the file's name.
        ValueError: `block_size` exceeds the checkpoint's.
    """
    file = _locate(path)
    read = {HF_FILE: _read_hugging_face}.get(file.name) or (
        _read_packed if file.suffix == ".safetensors" else _read_pickled
    )
    weights, stated = read(file)
    weights = _with_tied_head(weights, file)
    config = _config(weights, stated, file)
    if config.vocab_size == END_OF_TEXT + 1:
        weights[WTE] = weights[HEAD] = _with_padded_vocabulary(weights[WTE])
        config = dataclasses.replace(config, vocab_size=PADDED_VOCAB_SIZE)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    model = _build(config, weights, file)
    if block_size is not None:
        model.crop_block_size(block_size)
    return model


def load_registry_source(path: str | Path) -> Mapping[str, Any] | None:
    """The domain file that travels in a Lightning .ckpt, for `functions.registry_from_source`.

    None for checkpoints of other programs, which carry no domain.

    Raises:
        CheckpointError: the file can't be read.
    """
    file = _locate(path)
    if file.name == HF_FILE or file.suffix == ".safetensors":
        return None
    source = load_plain(file).get("registry")
    return source if isinstance(source, Mapping) else None


def _locate(path: str | Path) -> Path:
    """The file that tells the kind of checkpoint: its only one, or Hugging Face's config.json."""
    path = SHIPPED.get(str(path)) or Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    found = [path / name for name in (NANOGPT_FILE, HF_FILE) if (path / name).is_file()]
    if len(found) == 2:
        raise CheckpointError(f"{path}: holds two checkpoints; name {found[0]} or {found[1]}")
    if not found:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"{path}: neither {NANOGPT_FILE} (nanoGPT) nor {HF_FILE} (Hugging Face) in it, but "
            f"{inside}; name the checkpoint's file"
        )
    return found[0]


def load_plain(file: Path, *, is_mapped: bool = True) -> Mapping[str, Any]:
    """Read a pickled dict of tensors and plain values, mapped from disk where its format allows.

    Raises:
        CheckpointError: a damaged file, or one with code in it, which is never run.
    """
    try:
        is_mappable = is_mapped and zipfile.is_zipfile(file)
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mappable)
    except PermissionError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{file}: wants Python's {wanted[1]}, and code in a checkpoint is never run; where "
                "it was written, save it again with tensors, numbers and strings only"
            ) from None
        raise CheckpointError(
            f"{file}: no checkpoint, or a damaged one; copy it again from where it was written"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _read_pickled(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights, and what is said of them, of a nanoGPT checkpoint or a Lightning one of ours."""
    content = load_plain(file)
    match content:
        case {"model": Mapping() as weights, "model_args": Mapping() as model_args}:
            # nanoGPT computes the exact GELU; `save_nanogpt` leaves a note where a model doesn't.
            stated = {**model_args, "gelu": content.get("gelu", "exact")}
        case {"state_dict": Mapping() as weights, "gpt_config": Mapping() as config}:
            stated = dict(config)
        case {"state_dict": _}:
            raise CheckpointError(f"{file}: a Lightning checkpoint of another program")
        case _:
            inside = ", ".join(map(str, list(content)[:5])) or "nothing"
            raise CheckpointError(
                f"{file}: needs 'model' and 'model_args', as nanoGPT's train.py writes them, but "
                f"holds {inside}"
            )
    return _plain_names(weights, file), stated


def _read_packed(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and shape out of a file of `export.save_packed`, its 8-bit rows made floats again."""
    tensors = _load_tensors(file)
    with safe_open(file, "pt") as content:
        metadata = content.metadata() or {}
    if "gpt_config" not in metadata:
        raise CheckpointError(f"{file}: name the folder that holds it and its {HF_FILE} instead")
    weights = {
        name: weight * tensors[f"{name}.scale"] if weight.dtype == torch.int8 else weight
        for name, weight in tensors.items()
        if not name.endswith(".scale")
    }
    return _plain_names(weights, file), json.loads(metadata["gpt_config"])


def _read_hugging_face(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under nanoGPT's names, and what config.json says of them."""
    config = _load_json(file)
    stated = _stated_by_hugging_face(config, file)
    weights = _plain_names(_load_shards(file.parent), file.parent)
    if config.get("tie_word_embeddings") is False and HEAD not in weights:
        raise CheckpointError(f"{file}: tie_word_embeddings is false, but there is no {HEAD}")
    return {
        # The bare GPT2Model, as the first GPT-2 files were, has no prefix.
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": (
            weight.t() if name.endswith(CONV1D) and weight.ndim == 2 else weight
        )
        for name, weight in weights.items()
    }, stated


def _stated_by_hugging_face(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    for key, value in HF_GPT2.items():
        if (said := config.get(key, value)) != value:
            raise CheckpointError(f"{file}: {key} is {said!r}; only GPT-2's {value!r} can be read")
    activation, width = str(config.get("activation_function", "gelu_new")), config.get("n_embd", 0)
    if activation not in _GELU_OF_ACTIVATION:
        known = ", ".join(_GELU_OF_ACTIVATION)
        raise CheckpointError(f"{file}: activation_function {activation!r} is none of {known}")
    if (inner := config.get("n_inner")) is not None and inner != 4 * width:
        raise CheckpointError(f"{file}: n_inner {inner} is not 4 x n_embd {width}")
    sizes = ("vocab_size", "n_embd", "n_layer", "n_head")
    stated: dict[str, Any] = {key: config[key] for key in sizes if key in config}
    return stated | {
        "dropout": config.get("resid_pdrop", 0.1), "gelu": _GELU_OF_ACTIVATION[activation]
    }  # fmt: skip


def _load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must hold a JSON object, not a {type(content).__name__}")
    return content


def _load_shards(folder: Path) -> dict[str, Any]:
    """All tensors of a Hugging Face folder, whole or in the shards that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return dict(_load_tensors(folder / name))
        if (index := folder / f"{name}.index.json").is_file():
            shards = _load_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise CheckpointError(f"{index}: needs a 'weight_map'")
            files = sorted({folder / Path(str(shard)).name for shard in shards.values()})
            return {name: weight for file in files for name, weight in _load_tensors(file).items()}
    raise CheckpointError(f"{folder}: has {HF_FILE}, but no model.safetensors or pytorch_model.bin")


def _load_tensors(file: Path) -> Mapping[str, Any]:
    if file.suffix != ".safetensors":
        return load_plain(file)
    try:
        return load_file(file)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged; copy it again ({error})") from None


def _plain_names(weights: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Drop what torch.compile, DDP and our module put before names, and old versions' masks."""
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        parts = [part for part in str(name).split(".") if part not in _WRAPPERS]
        if parts[-2:] in (["attn", "bias"], ["attn", "masked_bias"]):
            continue
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise CheckpointError(f"{file}: {name} must hold floats, not {kind}")
        if not bool(weight.sum(dtype=torch.float32).isfinite()):
            raise CheckpointError(f"{file}: {name} is not finite; take an earlier checkpoint")
        plain[".".join(parts)] = weight
    return plain


def _with_tied_head(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Put the one matrix of token embedding and vocabulary head under both its names."""
    shared = weights.get(WTE, weights.get(HEAD))
    if shared is None:
        raise CheckpointError(f"{file}: no GPT-2: it lacks {WTE}")
    head = weights.get(HEAD, shared)
    if head.shape != shared.shape or not bool((head == shared).all()):
        raise CheckpointError(f"{file}: {HEAD} is not tied to {WTE}, as GPT-2's is")
    return weights | {WTE: shared, HEAD: shared}


def _config(weights: dict[str, Tensor], stated: Mapping[str, Any], file: Path) -> GPTConfig:
    """Sizes are read off the weights, and must be the stated ones where any are stated.

    Heads, dropout and GELU leave no trace in the weights. A stated block_size is not compared:
    some descendants of nanoGPT crop the positions and leave the old number.
    """
    wte, wpe = weights[WTE], weights.get(WPE)
    if wpe is None or wpe.ndim != 2 or wte.ndim != 2:
        raise CheckpointError(f"{file}: no GPT-2: {WTE} and {WPE} must both be matrices")
    layers = {layer[1] for n in weights if (layer := re.match(r"transformer\.h\.(\d+)\.", n))}
    has_bias = any(name.endswith(".c_fc.bias") for name in weights)
    found: dict[str, Any] = {
        "vocab_size": wte.size(0), "n_embd": wte.size(1), "n_layer": len(layers), "bias": has_bias
    }  # fmt: skip
    for name, size in found.items():
        if (said := stated.get(name, size)) != size:
            raise CheckpointError(f"{file}: says {name} is {said}, but its weights have {size}")
    if not isinstance(n_head := stated.get("n_head"), int):
        raise CheckpointError(f"{file}: must say how many heads (n_head), not {n_head!r}")
    try:
        return GPTConfig(
            block_size=wpe.size(0),
            n_head=n_head,
            dropout=stated.get("dropout", 0.0),
            gelu=stated.get("gelu", "exact"),
            **found,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def _with_padded_vocabulary(wte: Tensor) -> Tensor:
    """Give the ids from 50257 to 50303 the mean of the known rows, (V, C) to (50304, C).

    The head is tied, so a new id's logit is the mean of all logits: it can't be the largest, and
    47 of them hardly move the softmax. (Zeros would win: GPT-2's logits lie far below zero.) As
    the input of END_OF_PROMPT the mean is a usable, neutral start.
    """
    mean = wte.float().mean(0, keepdim=True)
    return torch.cat([wte.float(), mean.expand(PADDED_VOCAB_SIZE - wte.size(0), -1)])


class _Uninitialized(TorchFunctionMode):
    """Leaves out torch.nn.init where weights will be replaced.

    The meta device would do so too, but it imports sympy or torch._dynamo, 0.5 to 0.9 s.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _build(config: GPTConfig, weights: dict[str, Tensor], file: Path) -> GPT:
    with _Uninitialized():
        model = GPT(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for problem, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has the unknown", weights.keys() - expected.keys()),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{file}: no GPT-2: it {problem} {min(names)}{others}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            has = tuple(weights[name].shape)
            raise CheckpointError(f"{file}: {name} has shape {has}; by its other sizes, {shape}")
    model.load_state_dict(weights)
    return model
