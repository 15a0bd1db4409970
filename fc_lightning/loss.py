"""Cross-entropy of a vocabulary head without ever holding all its logits.

Shapes: N states, C width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def head_cross_entropy_sum(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, summed over states, of `states @ weight.T` against `targets`; in nats, ().

    Takes states (N, C), the head's weight (V, C) and target ids (N,). The same as
    `F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum")`, but the logits
    exist for a chunk of states at a time, and gradients are computed along with them: the loss is
    a scalar, so backward only scales them (as in Liger-Kernel's fused linear cross-entropy).
    Products run in the autocast dtype if autocast is on; softmax and sums are in fp32.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        states = states.to(torch.get_autocast_dtype(device))
    # Asked here, since inside a Function gradients are always off and always asked for.
    needs_gradient = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    return _HeadCrossEntropySum.apply(states, weight, targets, needs_gradient)


class _HeadCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool
    ) -> Tensor:
        head = weight.to(states.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=states.device)
        d_states = torch.empty_like(states) if needs_gradient else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        size = min(8192 if states.is_cuda else 1024, max(1, len(states)))
        buffer = states.new_empty(size, len(weight))
        for start in range(0, len(states), size):
            chunk, ids = states[start : start + size], targets[start : start + size]
            logits = torch.mm(chunk, head.T, out=buffer[: len(chunk)])  # (chunk, V)
            loss += _to_gradient(logits, ids)
            if d_states is not None and d_weight is not None:
                torch.mm(logits, head, out=d_states[start : start + size])
                _add_product(d_weight, logits.T, chunk)
        ctx.save_for_backward(d_states, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_states, d_weight = ctx.saved_tensors
        (scale,) = d_loss
        return d_states * scale.to(d_states.dtype), d_weight * scale, None, None


def _to_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (N, V) in place into the loss's gradient by them; returns the summed loss."""
    if logits.is_cuda and find_spec("triton") is not None:
        from fc_lightning.kernels import cross_entropy_gradient_

        return cross_entropy_gradient_(logits, targets).sum()
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    # On a CPU, 16 rows in fp32 stay in the cache for all passes: 25 % less time than 128.
    size = 4096 if logits.is_cuda else 16
    scratch = logits.new_empty(min(size, len(logits)), logits.size(1), dtype=torch.float32)
    for part, ids in zip(logits.split(size), targets[:, None].split(size), strict=True):
        softmax = scratch[: len(part)].copy_(part)
        highest, target = softmax.amax(dim=1, keepdim=True), softmax.gather(1, ids)
        normalizer = softmax.sub_(highest).exp_().sum(dim=1, keepdim=True)
        softmax.div_(normalizer)
        loss += (normalizer.log() + highest - target).sum()
        softmax.scatter_add_(1, ids, softmax.new_full(ids.shape, -1.0))
        part.copy_(softmax)
    return loss


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in fp32 whatever the factors' type."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
