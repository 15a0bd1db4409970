"""Triton kernels for training on a GPU: residual, dropout and norm at once; cross-entropy in place.

What is dropped is a hash of a seed and of where a number stands: it needs no memory, and is
computed anew in the backward pass. What is summed is in fp32, whatever PyTorch's default dtype,
which Lightning lowers for `precision: bf16-true`.

Shapes: N tokens, C width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # tokens whose part in a norm's gradients one program sums


# ---------------------------------------------------------------- dropout


def draw_seed(device: torch.device, dropout: float) -> Tensor:
    """What a kernel's dropout follows from, (1,), on the device.

    Without dropout it isn't read, and to draw it would move the random state.
    """
    if dropout:
        return torch.randint(2**31 - 1, (1,), device=device)
    return torch.empty(1, dtype=torch.int64, device=device)


def num_dropped(dropout: float) -> int:
    """How many of 2**32 are dropped, as the kernels' DROPPED."""
    return round(dropout * 2**32)


@triton.jit
def token_noise(seed, tokens):
    return _hash(tokens.to(tl.uint32) ^ tl.load(seed).to(tl.uint32))


@triton.jit
def is_kept(noise, at, DROPPED: tl.constexpr):
    """Whether what stands `at` a token, whose noise it is, is kept; DROPPED of 2**32 are not.

    The token's hash and the place's are mixed once more. The whole number is compared, which its
    high bits decide, so lowbias32's last shift, which mends the low ones, is left out.
    """
    x = (noise ^ _hash(at.to(tl.uint32) * 0x9E3779B1 + 0x7F4A7C15)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B >= DROPPED


@triton.jit
def kept_scale(DROPPED: tl.constexpr):
    """What makes up for the dropped."""
    return 4294967296.0 / (4294967296 - DROPPED)


@triton.jit
def _hash(x):
    """lowbias32, by Chris Wellons (2018)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


# ---------------------------------------------------------------- residual and norm


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x + dropout(branch), and its LayerNorm in the branch's dtype, all (N, C).

    Takes the norm's weight (C,), and its bias if it has one. Sums are in fp32.
    """
    seed = draw_seed(x.device, dropout)
    return _AddNorm.apply(x, branch, weight, bias, seed, dropout)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor,
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        N, C = x.shape
        total, normed = torch.empty_like(x), torch.empty_like(branch)
        stats = torch.empty(2, N, dtype=torch.float32, device=x.device)
        options = {
            "C": C,
            "WIDTH": triton.next_power_of_2(C),
            "DROPPED": num_dropped(dropout),
            "num_warps": 8,
        }
        has_bias = bias is not None
        _add_norm[(N,)](
            x,
            branch,
            weight,
            bias if bias is not None else weight,
            total,
            normed,
            stats,
            seed,
            N,
            HAS_BIAS=has_bias,
            **options,
        )
        ctx.save_for_backward(total, weight, stats, seed)
        ctx.options, ctx.has_bias, ctx.dtype = options, has_bias, branch.dtype
        return total, normed

    @staticmethod
    def backward(
        ctx: Any, *d_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        total, weight, stats, seed = ctx.saved_tensors
        d_total, d_normed = (d.contiguous() for d in d_outputs)
        N, C = total.shape
        programs = triton.cdiv(N, _ROWS)
        d_x = torch.empty_like(total)
        d_branch = torch.empty(N, C, dtype=ctx.dtype, device=total.device)
        sums = torch.empty(2, programs, C, dtype=torch.float32, device=total.device)
        _add_norm_backward[(programs,)](
            d_total,
            d_normed,
            total,
            weight,
            stats,
            d_x,
            d_branch,
            sums,
            seed,
            N,
            ROWS=_ROWS,
            **ctx.options,
        )
        d_weight, d_bias = sums.sum(1).to(weight.dtype)
        return d_x, d_branch, d_weight, d_bias if ctx.has_bias else None, None, None


@triton.jit
def _add_norm(
    x,
    branch,
    weight,
    bias,
    total,
    normed,
    stats,
    seed,
    N,
    HAS_BIAS: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPPED: tl.constexpr,
):
    row, at = tl.program_id(0), tl.arange(0, WIDTH)
    here = row.to(tl.int64) * C + at
    added = tl.load(branch + here, mask=at < C, other=0.0).to(tl.float32)
    if DROPPED > 0:
        kept = is_kept(token_noise(seed, row), at, DROPPED)
        added = tl.where(kept, added * kept_scale(DROPPED), 0.0)
    sums = tl.load(x + here, mask=at < C, other=0.0).to(tl.float32) + added
    tl.store(total + here, sums.to(total.dtype.element_ty), mask=at < C)
    mean = tl.sum(sums, 0) / C
    centred = tl.where(at < C, sums - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + 1e-5)
    tl.store(stats + row, mean)
    tl.store(stats + N + row, rstd)
    y = centred * rstd * tl.load(weight + at, mask=at < C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + at, mask=at < C, other=0.0).to(tl.float32)
    tl.store(normed + here, y.to(normed.dtype.element_ty), mask=at < C)


@triton.jit
def _add_norm_backward(
    d_total,
    d_normed,
    total,
    weight,
    stats,
    d_x,
    d_branch,
    sums,
    seed,
    N,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """ROWS rows a program, and their part in the gradients of the norm's weight and bias."""
    nth, at = tl.program_id(0), tl.arange(0, WIDTH)
    factor = tl.load(weight + at, mask=at < C, other=0.0).to(tl.float32)
    d_weight = tl.zeros([WIDTH], tl.float32)
    d_bias = tl.zeros([WIDTH], tl.float32)
    for i in range(0, tl.minimum(N - nth * ROWS, ROWS)):
        row = nth * ROWS + i
        here = row.to(tl.int64) * C + at
        d_y = tl.load(d_normed + here, mask=at < C, other=0.0).to(tl.float32)
        mean, rstd = tl.load(stats + row), tl.load(stats + N + row)
        y = (tl.load(total + here, mask=at < C, other=0.0).to(tl.float32) - mean) * rstd
        d_weight += d_y * y
        d_bias += d_y
        d_y *= factor
        d_sums = (d_y - tl.sum(d_y, 0) / C - y * (tl.sum(d_y * y, 0) / C)) * rstd
        d_sums += tl.load(d_total + here, mask=at < C, other=0.0).to(tl.float32)
        tl.store(d_x + here, d_sums.to(d_x.dtype.element_ty), mask=at < C)
        if DROPPED > 0:
            kept = is_kept(token_noise(seed, row), at, DROPPED)
            d_sums = tl.where(kept, d_sums * kept_scale(DROPPED), 0.0)
        tl.store(d_branch + here, d_sums.to(d_branch.dtype.element_ty), mask=at < C)
    tl.store(sums + nth * C + at, d_weight, mask=at < C)
    tl.store(sums + (tl.num_programs(0) + nth) * C + at, d_bias, mask=at < C)


# ---------------------------------------------------------------- cross-entropy


def cross_entropy_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (N, V) in place into the loss's gradient by them; returns the loss of each row.

    The loss is the cross-entropy against target ids (N,), in nats, fp32. A row is read twice,
    the second time from the cache, and written once.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[(len(logits),)](
        logits, targets, losses, logits.size(1), BLOCK=16384, num_warps=16
    )
    return losses


@triton.jit
def _cross_entropy(logits, targets, losses, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    target = tl.load(targets + row)
    at_target = tl.load(logits + target).to(tl.float32)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        scores = tl.load(logits + at, mask=at < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(scores, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(scores - new), 0)
        highest = new
    norm = highest + tl.log(total)
    tl.store(losses + row, norm - at_target)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        scores = tl.load(logits + at, mask=at < V, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(scores - norm) - tl.where(at == target, 1.0, 0.0)
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < V)
