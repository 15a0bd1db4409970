"""Attention of packed rows: rows of any lengths, end to end, that all follow one prefix.

Attention kernels made for long rows want keys and values of prefix and row side by side, copied
for every row, and padded. These read queries, keys and values where the layer's product left
them, and write gradients where it takes them up. The algorithm is FlashAttention-2 (Dao 2023):
tiles of queries against keys, with a running softmax, whose weights are computed anew in the
backward pass. A tile is any tokens that lie side by side, whatever rows they are of, and meets
the keys from the first that one of them sees to the last. Gradients are summed in a fixed order,
so runs repeat exactly.

Shapes: N tokens in all, the prefix's P and then the rows', end to end; H heads of size D, C wide
together.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fc_lightning.kernels import draw_seed, is_kept, kept_scale, num_dropped, token_noise

_TILE = 64  # tokens of whose queries, or keys, a program computes what is theirs
_STEP = 32  # tokens that it goes on by, to those that they meet
_SPLIT = 1024  # queries whose part in the gradients of the prefix's keys one program sums


def row_bounds(starts: Tensor, *, prefix_length: int, num_tokens: int) -> Tensor:
    """Of the prefix's and the rows' tokens, where their row begins and ends, (2, N), int32.

    Row i begins at token `starts`[i], (B + 1,), after the prefix; the last row ends where the
    last of them says, and what is left of the `num_tokens` after the prefix is padding, each
    token of it a row.
    """
    P = prefix_length
    at = torch.arange(num_tokens, device=starts.device)
    row = torch.searchsorted(starts, at, right=True).clamp(max=len(starts) - 1)
    is_padding = at >= starts[-1]
    first = torch.where(is_padding, at, starts[row - 1])
    end = torch.where(is_padding, at + 1, starts[row])
    # Not made of numbers that are here: a GPU would be waited for.
    prefix = torch.stack([starts.new_zeros(P), starts.new_full((P,), P)])
    return torch.cat([prefix, torch.stack([first, end]) + P], dim=1).to(torch.int32)


def packed_attention(
    qkv: Tensor, bounds: Tensor, *, num_heads: int, prefix_length: int, dropout: float = 0.0
) -> Tensor:
    """What each token sees, (N, C), of queries, keys and values (N, 3 C) side by side.

    A prefix's token sees the prefix up to itself; a row's token, the whole prefix and its own
    row up to itself. `bounds` are those of `row_bounds`. Attention weights are dropped with
    probability `dropout`.
    """
    seed = draw_seed(qkv.device, dropout)
    return _PackedAttention.apply(qkv, bounds, seed, num_heads, prefix_length, dropout)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bounds: Tensor, seed: Tensor, num_heads: int, P: int, dropout: float
    ) -> Tensor:
        N, C = qkv.size(0), qkv.size(1) // 3
        y = qkv.new_empty(N, C)
        lse = torch.empty(num_heads, N, dtype=torch.float32, device=qkv.device)
        options = _options(qkv, num_heads, dropout)
        _forward[(triton.cdiv(N, _TILE), num_heads)](qkv, bounds, y, lse, seed, N, P, **options)
        ctx.save_for_backward(qkv, bounds, y, lse, seed)
        ctx.num_heads, ctx.P, ctx.dropout = num_heads, P, dropout
        return y

    @staticmethod
    def backward(ctx: Any, *d_output: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv, bounds, y, lse, seed = ctx.saved_tensors
        H, P, dropout = ctx.num_heads, ctx.P, ctx.dropout
        d_y = d_output[0].contiguous()
        N, C = y.shape
        options = _options(qkv, H, dropout)
        d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
        _backward_queries[(triton.cdiv(N, _TILE), H)](
            qkv, bounds, y, d_y, lse, delta, d_qkv, seed, N, P, **options
        )
        inputs = qkv, bounds, d_y, lse, delta
        _backward_keys[(triton.cdiv(N - P, _TILE), H)](
            *inputs, d_qkv, seed, N, P, SPLIT=0, **options
        )
        if P:
            splits = triton.cdiv(N, _SPLIT)
            d_prefix = torch.empty(splits, P, 2 * C, dtype=torch.float32, device=qkv.device)
            if options["num_stages"] > 1:  # there is room, and many queries to go through
                options["STEP"] *= 2
            _backward_keys[(splits, H, triton.cdiv(P, _TILE))](
                *inputs, d_prefix, seed, N, P, SPLIT=_SPLIT, **options
            )
            # By a kernel: torch.compile would copy all gradients to set a few of them.
            _sum_splits[(P, triton.cdiv(2 * C, 256))](d_prefix, d_qkv, splits, P, C=C, BLOCK=256)
        return d_qkv, None, None, None, None, None


def _options(qkv: Tensor, num_heads: int, dropout: float) -> dict[str, Any]:
    C = qkv.size(1) // 3
    width = max(16, triton.next_power_of_2(C // num_heads))
    num_bytes = width * qkv.itemsize  # of a head's state
    # Steps and loads ahead for which every GPU's shared memory has room, at least 99 KB.
    return {
        "C": C,
        "D": C // num_heads,
        "WIDTH": width,
        "TILE": _TILE,
        "STEP": _STEP if num_bytes <= 256 else _STEP // 2,
        "DROPPED": num_dropped(dropout),
        "num_warps": 4,
        "num_stages": 3 if num_bytes <= 128 else 1,
    }


@triton.jit
def _forward(
    qkv,
    bounds,
    y,
    lse,
    seed,
    N,
    P,
    C: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    DROPPED: tl.constexpr,
):
    start, head = tl.program_id(0) * TILE, tl.program_id(1)
    tokens = start + tl.arange(0, TILE)
    row = tl.load(bounds + tokens, mask=tokens < N, other=0)
    query = _load(qkv + head * D, tokens, N, 3 * C, D, WIDTH)
    noise = token_noise(seed, head * N + tokens)
    highest = tl.full([TILE], -1e30, tl.float32)  # finite: other rows' keys may come first
    total = tl.zeros([TILE], tl.float32)
    states = tl.zeros([TILE, WIDTH], tl.float32)
    num_first = tl.cdiv(tl.minimum(P, start + TILE), STEP)
    first = tl.maximum(tl.load(bounds + start), P)  # of all the rows' keys that the tile sees
    num_own = tl.cdiv(tl.maximum(tl.minimum(start + TILE, N) - first, 0), STEP)
    for i in range(0, num_first + num_own):
        keys, end, is_visible = _keys(i, num_first, first, tokens, row, N, P, STEP)
        key, value = _keys_and_values(qkv + head * D, keys, end, C, D, WIDTH)
        scores = _scores(query, key, is_visible, D)
        new = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        decay = tl.exp2(highest - new)
        total = total * decay + tl.sum(weights, 1)
        if DROPPED > 0:
            weights = tl.where(is_kept(noise[:, None], keys[None, :], DROPPED), weights, 0.0)
        states = states * decay[:, None]
        states += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = new
    states = states / total[:, None] * kept_scale(DROPPED)
    _store(y + head * D, states, tokens, N, C, D, WIDTH)
    tl.store(lse + head * N + tokens, highest + tl.log2(total), mask=tokens < N)


@triton.jit
def _backward_queries(
    qkv,
    bounds,
    y,
    d_y,
    lse,
    delta,
    d_qkv,
    seed,
    N,
    P,
    C: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    DROPPED: tl.constexpr,
):
    start, head = tl.program_id(0) * TILE, tl.program_id(1)
    tokens = start + tl.arange(0, TILE)
    row = tl.load(bounds + tokens, mask=tokens < N, other=0)
    query = _load(qkv + head * D, tokens, N, 3 * C, D, WIDTH)
    d_states = _load(d_y + head * D, tokens, N, C, D, WIDTH)
    states = _load(y + head * D, tokens, N, C, D, WIDTH)
    mean = tl.sum(d_states.to(tl.float32) * states.to(tl.float32), 1)
    tl.store(delta + head * N + tokens, mean, mask=tokens < N)
    norm = tl.load(lse + head * N + tokens, mask=tokens < N, other=0.0)
    noise = token_noise(seed, head * N + tokens)
    d_query = tl.zeros([TILE, WIDTH], tl.float32)
    num_first = tl.cdiv(tl.minimum(P, start + TILE), STEP)
    first = tl.maximum(tl.load(bounds + start), P)
    num_own = tl.cdiv(tl.maximum(tl.minimum(start + TILE, N) - first, 0), STEP)
    for i in range(0, num_first + num_own):
        keys, end, is_visible = _keys(i, num_first, first, tokens, row, N, P, STEP)
        key, value = _keys_and_values(qkv + head * D, keys, end, C, D, WIDTH)
        weights = tl.exp2(_scores(query, key, is_visible, D) - norm[:, None])
        d_weights = tl.dot(d_states, tl.trans(value), input_precision="ieee")
        if DROPPED > 0:
            kept = is_kept(noise[:, None], keys[None, :], DROPPED)
            d_weights = tl.where(kept, d_weights * kept_scale(DROPPED), 0.0)
        d_scores = weights * (d_weights - mean[:, None])
        d_query += tl.dot(d_scores.to(key.dtype), key, input_precision="ieee")
    _store(d_qkv + head * D, d_query * D**-0.5, tokens, N, 3 * C, D, WIDTH)


@triton.jit
def _backward_keys(
    qkv,
    bounds,
    d_y,
    lse,
    delta,
    d_keys,
    seed,
    N,
    P,
    SPLIT: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    DROPPED: tl.constexpr,
):
    """Of the rows' keys, into d_qkv; or of the prefix's, the part of each SPLIT queries."""
    nth, head = tl.program_id(0), tl.program_id(1)
    if SPLIT > 0:
        start, end = tl.program_id(2) * TILE, P
        first, last = nth * SPLIT, tl.minimum(nth * SPLIT + SPLIT, N)
        d_keys += nth.to(tl.int64) * P * 2 * C + head * D
    else:
        start, end = P + nth * TILE, N
        # Queries see none of the keys after them, and none of other rows.
        first, last = start, tl.load(bounds + N + tl.minimum(start + TILE, N) - 1)
        d_keys += C + head * D
    keys = start + tl.arange(0, TILE)
    key, value = _keys_and_values(qkv + head * D, keys, end, C, D, WIDTH)
    d_key = tl.zeros([TILE, WIDTH], tl.float32)
    d_value = tl.zeros([TILE, WIDTH], tl.float32)
    for at in range(first, last, STEP):
        tokens = at + tl.arange(0, STEP)
        query = _load(qkv + head * D, tokens, last, 3 * C, D, WIDTH)
        d_states = _load(d_y + head * D, tokens, last, C, D, WIDTH)
        # Of what is not there all gradients are 0.
        norm = tl.load(lse + head * N + tokens, mask=tokens < last, other=0.0)
        mean = tl.load(delta + head * N + tokens, mask=tokens < last, other=0.0)
        is_visible = keys[:, None] <= tokens[None, :]
        if SPLIT == 0:
            row = tl.load(bounds + tokens, mask=tokens < last, other=0)
            is_visible &= keys[:, None] >= row[None, :]
        weights = tl.exp2(_scores(key, query, is_visible, D) - norm[None, :])  # (keys, queries)
        d_weights = tl.dot(value, tl.trans(d_states), input_precision="ieee")
        dropped = weights
        if DROPPED > 0:
            noise = token_noise(seed, head * N + tokens)
            kept = is_kept(noise[None, :], keys[:, None], DROPPED)
            dropped = tl.where(kept, weights, 0.0)
            d_weights = tl.where(kept, d_weights * kept_scale(DROPPED), 0.0)
        d_value += tl.dot(dropped.to(d_states.dtype), d_states, input_precision="ieee")
        d_scores = weights * (d_weights - mean[None, :])
        d_key += tl.dot(d_scores.to(query.dtype), query, input_precision="ieee")
    stride: tl.constexpr = 2 * C if SPLIT > 0 else 3 * C
    _store(d_keys, d_key * D**-0.5, keys, end, stride, D, WIDTH)
    _store(d_keys + C, d_value * kept_scale(DROPPED), keys, end, stride, D, WIDTH)


@triton.jit
def _sum_splits(d_prefix, d_qkv, splits, P, C: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the prefix's keys and values, a part of one token's a program."""
    token, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, splits, 16):
        split = start + tl.arange(0, 16)[:, None]
        is_there = (split < splits) & (at < 2 * C)[None, :]
        part = d_prefix + (split.to(tl.int64) * P + token) * 2 * C + at[None, :]
        total += tl.sum(tl.load(part, mask=is_there, other=0.0), 0)
    tl.store(d_qkv + token * 3 * C + C + at, total.to(d_qkv.dtype.element_ty), mask=at < 2 * C)


@triton.jit
def _keys(i, num_first, first, tokens, row, N, P, STEP: tl.constexpr):
    """The i-th step of a tile's keys, the prefix's first; where these end; who sees them."""
    is_own = i >= num_first
    keys = tl.where(is_own, first + (i - num_first) * STEP, i * STEP) + tl.arange(0, STEP)
    end = tl.where(is_own, N, P)
    lowest, highest = tl.where(is_own, row, 0), tl.minimum(tokens, end - 1)
    is_visible = (keys[None, :] >= lowest[:, None]) & (keys[None, :] <= highest[:, None])
    return keys, end, is_visible


@triton.jit
def _keys_and_values(qkv, tokens, end, C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    key = _load(qkv + C, tokens, end, 3 * C, D, WIDTH)
    return key, _load(qkv + 2 * C, tokens, end, 3 * C, D, WIDTH)


@triton.jit
def _scores(a, b, is_visible, D: tl.constexpr):
    """a @ b.T / sqrt(D), for a softmax of base 2. "ieee": in 32 bits as exact as layers are."""
    scores = tl.dot(a, tl.trans(b), input_precision="ieee") * (D**-0.5 * 1.4426950409)
    return tl.where(is_visible, scores, -float("inf"))


@triton.jit
def _load(base, tokens, end, stride: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)[None, :]
    is_there = (tokens < end)[:, None]
    if D < WIDTH:  # otherwise loads of several numbers at once would be taken apart
        is_there &= at < D
    return tl.load(base + tokens.to(tl.int64)[:, None] * stride + at, mask=is_there, other=0.0)


@triton.jit
def _store(base, states, tokens, end, stride: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)[None, :]
    is_there = (tokens < end)[:, None]
    if D < WIDTH:
        is_there &= at < D
    states = states.to(base.dtype.element_ty)
    tl.store(base + tokens.to(tl.int64)[:, None] * stride + at, states, mask=is_there)
