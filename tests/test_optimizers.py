"""Which weight gets which optimizer, and that two of them as one are exactly the two."""

from __future__ import annotations

import copy

import pytest
import torch

from fc_lightning.gpt import GPT, GPTConfig
from fc_lightning.optimizers import MuonAdamW, param_groups

SAID = {"learning_rate": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1}


def tiny_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=4, vocab_size=16, n_layer=2, n_head=2, n_embd=8))


def take_steps(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        ids = torch.randint(16, (3, 4), generator=torch.Generator().manual_seed(step))
        model(ids).logsumexp(-1).square().sum().backward()
        optimizer.step()


def names(model, group):
    return {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}


def test_biases_and_norms_are_not_decayed():
    model = tiny_gpt()
    decayed, others = param_groups(model, **SAID)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names(model, others) == {
        n for n, _ in model.named_parameters() if n.endswith(".bias") or ".ln_" in n
    }
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else():
    model = tiny_gpt()
    muon, decayed, _ = param_groups(model, **SAID, muon_lr=0.02)
    assert muon["lr"] == 0.02
    assert names(model, muon) == {
        f"transformer.h.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert names(model, decayed) == {"transformer.wpe.weight", "transformer.wte.weight"}


def test_one_optimizer_steps_exactly_as_muon_and_adamw_apart():
    one, two = tiny_gpt(), tiny_gpt()
    together = MuonAdamW(param_groups(one, **SAID, muon_lr=0.02), fused=False)
    groups = param_groups(two, **SAID, muon_lr=0.02)
    muon, adamw = torch.optim.Muon(groups[:1]), torch.optim.AdamW(groups[1:])
    take_steps(one, together, range(3))
    for step in range(3):
        adamw.zero_grad()
        take_steps(two, muon, [step])
        adamw.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("num_steps", [0, 2])
def test_a_loaded_state_goes_on_exactly(num_steps):
    model = tiny_gpt()
    optimizer = MuonAdamW(param_groups(model, **SAID, muon_lr=0.02), fused=False)
    take_steps(model, optimizer, range(num_steps))
    other = copy.deepcopy(model)
    loaded = MuonAdamW(param_groups(other, **SAID, muon_lr=0.5), fused=False)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(model, optimizer, range(5, 7))
    take_steps(other, loaded, range(5, 7))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_scheduler_moves_the_rates_of_both():
    model = tiny_gpt()
    optimizer = MuonAdamW(param_groups(model, **SAID, muon_lr=0.02), fused=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    take_steps(model, optimizer, [0])
    scheduler.step()
    before = copy.deepcopy(model.state_dict())
    take_steps(model, optimizer, [1])
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
