"""Triton kernels for training on a GPU: attention of packed rows, and cross-entropy in place.

Attention kernels made for long rows want keys and values of prefix and row side by side, copied
for every row, and padded. These read queries, keys and values where the layer's product left
them, and write gradients where it takes them up. The algorithm is FlashAttention-2 (Dao 2023):
blocks of queries against blocks of keys, with a running softmax, whose weights are computed anew
in the backward pass. Gradients are summed in a fixed order, so runs repeat exactly.

Shapes: N tokens in all, the prefix's P and then the rows', end to end; H heads of size D, C wide
together; M blocks of tokens; V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32  # queries, or keys, of a tile: short rows waste less of small ones
_BLOCKS_A_SPLIT = 32  # blocks of queries whose part in the prefix's gradients one program sums


# ---------------------------------------------------------------- attention


def attention_blocks(starts: Tensor, *, prefix_length: int, num_tokens: int) -> Tensor:
    """Blocks of tokens in which `packed_attention` computes, (M, 3).

    Row i begins at token `starts`[i], (B + 1,), after the prefix; the last row ends where the
    last of them says, and what is left of the `num_tokens` after the prefix is padding. A block
    has its row's first token, its own first, and where it ends at the latest. Their number
    follows from shapes alone: no one waits for the device, and what is left over is empty.
    """
    P, B = prefix_length, len(starts) - 1
    # Rounded up: so a compiled network meets few numbers, where batches differ in rows.
    M = -(-(num_tokens // _BLOCK + B + 1) // 64) * 64
    prefix = torch.arange(0, P, _BLOCK, dtype=torch.int32, device=starts.device)
    prefix = torch.stack([torch.zeros_like(prefix), prefix, torch.full_like(prefix, P)], dim=1)
    ends = torch.cat([starts[1:], starts.new_full((1,), num_tokens)])  # padding is one row more
    blocks = (ends - starts + _BLOCK - 1) // _BLOCK
    last = blocks.cumsum(0)
    at = torch.arange(M, device=starts.device)
    row = torch.searchsorted(last, at, right=True).clamp(max=B)
    first = starts[row] + (at - last[row] + blocks[row]) * _BLOCK
    # A block of padding sees the prefix and itself, whatever its length.
    is_row = row < B
    end = torch.where(is_row, ends[row], torch.minimum(first + _BLOCK, ends[row]))
    rows = torch.stack([torch.where(is_row, starts[row], first), first, end], dim=1) + P
    return torch.cat([prefix, rows.to(torch.int32)])


def packed_attention(
    qkv: Tensor, blocks: Tensor, *, num_heads: int, prefix_length: int, dropout: float = 0.0
) -> Tensor:
    """What each token sees, (N, C), of queries, keys and values (N, 3 C) side by side.

    A prefix's token sees the prefix up to itself; a row's token, the whole prefix and its own
    row up to itself. `blocks` are those of `attention_blocks`. Attention weights are dropped with
    probability `dropout`.
    """
    # Without dropout it isn't read, and to draw it would move the random state.
    seed = torch.empty(1, dtype=torch.int64, device=qkv.device)
    if dropout:
        seed = torch.randint(2**31 - 1, (1,), device=qkv.device)
    return _PackedAttention.apply(qkv, blocks, seed, num_heads, prefix_length, dropout)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, blocks: Tensor, seed: Tensor, num_heads: int, P: int, dropout: float
    ) -> Tensor:
        N, C = qkv.size(0), qkv.size(1) // 3
        y = qkv.new_empty(N, C)
        lse = torch.empty(num_heads, N, device=qkv.device)
        options = _options(qkv, num_heads, dropout)
        _forward[(len(blocks), num_heads)](qkv, blocks, y, lse, seed, N, P, **options)
        ctx.save_for_backward(qkv, blocks, y, lse, seed)
        ctx.num_heads, ctx.P, ctx.dropout = num_heads, P, dropout
        return y

    @staticmethod
    def backward(ctx: Any, *d_output: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        qkv, blocks, y, lse, seed = ctx.saved_tensors
        H, P, dropout = ctx.num_heads, ctx.P, ctx.dropout
        d_y = d_output[0].contiguous()
        N, C = y.shape
        options = _options(qkv, H, dropout)
        d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
        _backward_queries[(len(blocks), H)](
            qkv, blocks, y, d_y, lse, delta, d_qkv, seed, N, P, **options
        )
        prefix_blocks = -(-P // _BLOCK)
        splits = -(-N // (_BLOCK * _BLOCKS_A_SPLIT))
        d_prefix = torch.empty(splits, P, 2 * C, device=qkv.device)
        _backward_keys[(prefix_blocks * splits + len(blocks) - prefix_blocks, H)](
            qkv,
            blocks,
            d_y,
            lse,
            delta,
            d_qkv,
            d_prefix,
            seed,
            N,
            P,
            splits,
            BLOCKS_A_SPLIT=_BLOCKS_A_SPLIT,
            **options,
        )
        if P:  # by a kernel: torch.compile would copy all gradients to set a few of them
            _sum_splits[(P,)](d_prefix, d_qkv, splits, P, C=C, BLOCK=triton.next_power_of_2(2 * C))
        return d_qkv, None, None, None, None, None


def _options(qkv: Tensor, num_heads: int, dropout: float) -> dict[str, Any]:
    C = qkv.size(1) // 3
    return {
        "C": C,
        "D": C // num_heads,
        "WIDTH": max(16, triton.next_power_of_2(C // num_heads)),
        "BLOCK": _BLOCK,
        "DROPOUT": dropout,
        "num_warps": 2,
        "num_stages": 2,
    }


@triton.jit
def _forward(
    qkv,
    blocks,
    y,
    lse,
    seed,
    N,
    P,
    C: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    head = tl.program_id(1)
    # Loaded here: from a helper, torch.compile would take `blocks` for written (see _num_keys).
    block = blocks + 3 * tl.program_id(0)
    row, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    tokens = start + tl.arange(0, BLOCK)
    query = _load(qkv + head * D, tokens, end, 3 * C, D, WIDTH)
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    states = tl.zeros([BLOCK, WIDTH], tl.float32)
    num_first, num_keys = _num_keys(row, start, end, P, BLOCK)
    for i in range(0, num_keys):
        keys, key_end = _keys_of(i, num_first, row, end, P, BLOCK)
        key, value = _keys_and_values(qkv + head * D, keys, key_end, C, D, WIDTH)
        is_visible = (keys[None, :] <= tokens[:, None]) & (keys < key_end)[None, :]
        scores = _scores(query, key, is_visible, D)
        new = tl.maximum(highest, tl.max(scores, 1))  # every query sees the first: never -inf
        weights = tl.exp2(scores - new[:, None])
        decay = tl.exp2(highest - new)
        total = total * decay + tl.sum(weights, 1)
        if DROPOUT > 0:
            weights *= _kept(seed, (head * N + tokens)[:, None], keys[None, :], DROPOUT)
        states = states * decay[:, None]
        states += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = new
    _store(y + head * D, states / total[:, None], tokens, end, C, D, WIDTH)
    tl.store(lse + head * N + tokens, highest + tl.log2(total), mask=tokens < end)


@triton.jit
def _backward_queries(
    qkv,
    blocks,
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
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    head = tl.program_id(1)
    block = blocks + 3 * tl.program_id(0)
    row, start, end = tl.load(block), tl.load(block + 1), tl.load(block + 2)
    tokens = start + tl.arange(0, BLOCK)
    query = _load(qkv + head * D, tokens, end, 3 * C, D, WIDTH)
    d_states = _load(d_y + head * D, tokens, end, C, D, WIDTH)
    states = _load(y + head * D, tokens, end, C, D, WIDTH)
    mean = tl.sum(d_states.to(tl.float32) * states.to(tl.float32), 1)
    tl.store(delta + head * N + tokens, mean, mask=tokens < end)
    norm = tl.load(lse + head * N + tokens, mask=tokens < end, other=0.0)
    d_query = tl.zeros([BLOCK, WIDTH], tl.float32)
    num_first, num_keys = _num_keys(row, start, end, P, BLOCK)
    for i in range(0, num_keys):
        keys, key_end = _keys_of(i, num_first, row, end, P, BLOCK)
        key, value = _keys_and_values(qkv + head * D, keys, key_end, C, D, WIDTH)
        is_visible = (keys[None, :] <= tokens[:, None]) & (keys < key_end)[None, :]
        weights = tl.exp2(_scores(query, key, is_visible, D) - norm[:, None])
        d_weights = tl.dot(d_states, tl.trans(value), input_precision="ieee")
        if DROPOUT > 0:
            d_weights *= _kept(seed, (head * N + tokens)[:, None], keys[None, :], DROPOUT)
        d_scores = weights * (d_weights - mean[:, None])
        d_query += tl.dot(d_scores.to(key.dtype), key, input_precision="ieee")
    _store(d_qkv + head * D, d_query * D**-0.5, tokens, end, 3 * C, D, WIDTH)


@triton.jit
def _backward_keys(
    qkv,
    blocks,
    d_y,
    lse,
    delta,
    d_qkv,
    d_prefix,
    seed,
    N,
    P,
    splits,
    BLOCKS_A_SPLIT: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """The prefix's keys first, which all queries see, a share of these a program; then rows'."""
    head, prefix_blocks = tl.program_id(1), tl.cdiv(P, BLOCK)
    nth = tl.program_id(0) - prefix_blocks * splits  # of the blocks of rows
    is_prefix = nth < 0
    split = tl.program_id(0) // tl.maximum(prefix_blocks, 1)
    at_prefix = tl.program_id(0) % tl.maximum(prefix_blocks, 1)
    # A block of keys, and the queries that see it.
    block = blocks + 3 * tl.where(is_prefix, at_prefix, prefix_blocks + nth)
    start, end = tl.load(block + 1), tl.load(block + 2)
    first = tl.where(is_prefix, split * BLOCKS_A_SPLIT * BLOCK, start)
    last = tl.where(is_prefix, tl.minimum(first + BLOCKS_A_SPLIT * BLOCK, N), end)

    keys = start + tl.arange(0, BLOCK)
    key, value = _keys_and_values(qkv + head * D, keys, end, C, D, WIDTH)
    d_key = tl.zeros([BLOCK, WIDTH], tl.float32)
    d_value = tl.zeros([BLOCK, WIDTH], tl.float32)
    for i in range(0, tl.cdiv(last - first, BLOCK)):
        tokens = first + i * BLOCK + tl.arange(0, BLOCK)
        query = _load(qkv + head * D, tokens, last, 3 * C, D, WIDTH)
        d_states = _load(d_y + head * D, tokens, last, C, D, WIDTH)
        norm = tl.load(lse + head * N + tokens, mask=tokens < last, other=0.0)
        mean = tl.load(delta + head * N + tokens, mask=tokens < last, other=0.0)
        is_visible = (keys[:, None] <= tokens[None, :]) & (tokens < last)[None, :]
        weights = tl.exp2(_scores(key, query, is_visible, D) - norm[None, :])  # (keys, queries)
        d_weights = tl.dot(value, tl.trans(d_states), input_precision="ieee")
        dropped = weights
        if DROPOUT > 0:
            kept = _kept(seed, (head * N + tokens)[None, :], keys[:, None], DROPOUT)
            dropped *= kept
            d_weights *= kept
        d_value += tl.dot(dropped.to(d_states.dtype), d_states, input_precision="ieee")
        d_scores = weights * (d_weights - mean[None, :])
        d_key += tl.dot(d_scores.to(query.dtype), query, input_precision="ieee")
    if is_prefix:
        partial = d_prefix + split.to(tl.int64) * P * 2 * C + head * D
        _store(partial, d_key * D**-0.5, keys, end, 2 * C, D, WIDTH)
        _store(partial + C, d_value, keys, end, 2 * C, D, WIDTH)
    else:
        _store(d_qkv + C + head * D, d_key * D**-0.5, keys, end, 3 * C, D, WIDTH)
        _store(d_qkv + 2 * C + head * D, d_value, keys, end, 3 * C, D, WIDTH)


@triton.jit
def _sum_splits(d_prefix, d_qkv, splits, P, C: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of the prefix's keys and values, one token a program."""
    token, at = tl.program_id(0), tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(0, splits):
        total += tl.load(d_prefix + (split * P + token) * 2 * C + at, mask=at < 2 * C, other=0.0)
    tl.store(d_qkv + token * 3 * C + C + at, total.to(d_qkv.dtype.element_ty), mask=at < 2 * C)


@triton.jit
def _num_keys(row, start, end, P, BLOCK: tl.constexpr):
    """How many blocks of keys a block of queries sees, those of the prefix, and all.

    None if it is empty. To return early instead would hide from torch.compile what a kernel
    writes: it would copy all that it reads, and give up on CUDA graphs.
    """
    num_first = tl.cdiv(tl.minimum(P, start + BLOCK), BLOCK)
    num_own = tl.cdiv(tl.minimum(end, start + BLOCK) - row, BLOCK)
    return num_first, tl.where(start < end, num_first + tl.where(row >= P, num_own, 0), 0)


@triton.jit
def _keys_of(i, num_first, row, end, P, BLOCK: tl.constexpr):
    """The i-th block of keys that a row sees, the prefix's first, and where they end."""
    is_own = i >= num_first
    keys = tl.where(is_own, row + (i - num_first) * BLOCK, i * BLOCK) + tl.arange(0, BLOCK)
    return keys, tl.where(is_own, end, P)


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


@triton.jit
def _kept(seed, queries, keys, DROPOUT: tl.constexpr):
    """What weights are multiplied by, 0 or 1 / (1 - dropout).

    A hash of seed, query and key: Wellons's lowbias32, once for a query and once for a weight.
    """
    query = _hash(queries.to(tl.uint32) ^ tl.load(seed).to(tl.uint32))
    x = _hash(query ^ (keys.to(tl.uint32) * 0x9E3779B1))
    is_kept = (x >> 8).to(tl.float32) * (1.0 / 16777216.0) >= DROPOUT
    return tl.where(is_kept, 1.0 / (1.0 - DROPOUT), 0.0)


@triton.jit
def _hash(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


# ---------------------------------------------------------------- cross-entropy


def cross_entropy_gradient_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (N, V) in place into the loss's gradient by them; returns the loss of each row.

    The loss is the cross-entropy against target ids (N,), in nats, fp32. A row is read twice,
    the second time from the cache, and written once.
    """
    losses = torch.empty(len(logits), device=logits.device)
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
