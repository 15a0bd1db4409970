"""How a GPT's weights are stepped: AdamW for all, or Muon for the blocks' matrices beside it.

What the gradient is, and when a step is taken, is module.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def check_training(p: Any) -> None:
    """Refuse a FunctionCallModule's rates and schedule if no weights can be stepped by them.

    Raises:
        ValueError: one of them.
    """
    for name, known in (("lr_schedule", ("cosine", "trapezoid")), ("optimizer", ("adamw", "muon"))):
        if p[name] not in known:
            raise ValueError(f"{name} must be {known[0]} or {known[1]}, not {p[name]!r}")
    for name in ("learning_rate", *(["muon_lr"] if p.optimizer == "muon" else [])):
        if not 0 < p[name] < math.inf:
            raise ValueError(f"{name} must be above 0, not {p[name]}")
    if not 0 <= p.min_lr <= p.learning_rate:
        raise ValueError(
            f"min_lr must be from 0 to learning_rate {p.learning_rate}, not {p.min_lr}"
        )
    for name, least in (("warmup_iters", 0), ("lr_decay_iters", 1), ("weight_decay", 0)):
        if p[name] is not None and not p[name] >= least:
            raise ValueError(f"{name} must be at least {least}, not {p[name]}")
    for name in ("beta1", "beta2"):
        if not 0 <= p[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), not {p[name]}")


def param_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    muon_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Weights in groups, with everything that is said about each of them.

    Matrices and embeddings are decayed, biases and norms are not (nanoGPT's rule). With a
    `muon_lr` the matrices of the blocks come first, in a group for `MuonAdamW`; embeddings and
    the head that is tied to them stay with AdamW, as Muon's author has it.
    """
    named = list(model.named_parameters())
    is_muon = {name: muon_lr is not None and w.dim() == 2 and ".h." in name for name, w in named}
    adamw = {"lr": learning_rate, "betas": betas}
    groups: list[dict[str, Any]] = [
        {
            "params": [w for name, w in named if w.dim() >= 2 and not is_muon[name]],
            "weight_decay": weight_decay,
            **adamw,
        },
        {"params": [w for _, w in named if w.dim() < 2], "weight_decay": 0.0, **adamw},
    ]
    if muon_lr is not None:
        matrices = [w for name, w in named if is_muon[name]]
        groups.insert(0, {"params": matrices, "weight_decay": weight_decay, "lr": muon_lr})
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the first group, AdamW for the others, as one optimizer.

    One, because Lightning's automatic optimization steps, clips, schedules and saves just one.
    """

    def __init__(self, groups: list[dict[str, Any]], *, fused: bool) -> None:
        muon = torch.optim.Muon(groups[:1])
        adamw = torch.optim.AdamW(groups[1:], fused=fused)
        self.parts = (muon, adamw)
        super().__init__(muon.param_groups + adamw.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        # Groups and state belong to this optimizer, which loads and saves them: lend them out.
        for part, groups in zip(
            self.parts, (self.param_groups[:1], self.param_groups[1:]), strict=True
        ):
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss
