"""Small checkpoints with nothing left to chance, for the tests of reading and of writing them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from naive_nanogpt import NanoConfig, NanoGPT
from torch import nn

from fc_lightning.gpt import GPT, GPTConfig

SHAPE = {"block_size": 12, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 8}
REFERENCES = Path(__file__).parents[2] / "shared" / "checkpoints"
IDS = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))


def nanogpt_resumed(file: Path) -> NanoGPT:
    """What nanoGPT's sample.py and train.py do with a checkpoint: strict in every respect."""
    checkpoint = torch.load(file, map_location="cpu")
    model = NanoGPT(NanoConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).load_state_dict(checkpoint["optimizer"])
    assert checkpoint["iter_num"] == 0 and checkpoint["best_val_loss"] == 1e9
    return model


def randomized(model: nn.Module) -> nn.Module:
    """Every weight random, biases and norms too, so that none can be confused or left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def nanogpt_checkpoint(**changes) -> dict:
    """A checkpoint as nanoGPT's train.py writes it."""
    config = NanoConfig(**SHAPE | {"dropout": 0.1} | changes)
    return {
        "model": randomized(NanoGPT(config)).state_dict(),
        "model_args": dataclasses.asdict(config),
        "iter_num": 60,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4},
    }


def saved(checkpoint, path: Path) -> Path:
    torch.save(checkpoint, path)
    return path


def our_gpt(**changes) -> GPT:
    return randomized(GPT(GPTConfig(**SHAPE | changes)))


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out = model.eval()(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def reference_logits(checkpoint: dict) -> torch.Tensor:
    model = NanoGPT(NanoConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    return logits(model)


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Two implementations in float32 differ by rounding only, some 1e-6 on logits of size 1.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def hf_model(**changes):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_positions": 12, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 8}
    config = transformers.GPT2Config(**sizes | {"resid_pdrop": 0.2} | changes)
    return randomized(transformers.GPT2LMHeadModel(config))
