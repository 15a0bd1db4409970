"""nanoGPT's GPT-2, parameter names and all, with the key/value cache beside attention.

Only the network lives here: it returns hidden states or logits, never a loss, and knows nothing
of files (checkpoint.py), prompts (chat.py) or sampling (decoding.py).

Shapes: B batch, T tokens, S cached positions, V vocabulary, C width, H heads, D = C / H.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fc_lightning.tokenizer import PADDED_VOCAB_SIZE


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """nanoGPT's GPTConfig, and which form of GELU; the defaults are GPT-2's 124 M parameters.

    Raises:
        ValueError: a size below 1, n_embd that n_head doesn't divide, an impossible dropout.
    """

    block_size: int = 1024  # positions, prompt and response together
    vocab_size: int = PADDED_VOCAB_SIZE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # width of a position's state, all heads together
    dropout: float = 0.0  # probability, wherever GPT-2 has it
    bias: bool = True  # in linear layers and norms
    gelu: str = "exact"  # nanoGPT's; "tanh" is OpenAI's

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if (size := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {size}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.gelu not in ("exact", "tanh"):
            raise ValueError(f'gelu must be "exact" or "tanh", not {self.gelu!r}')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")


class KVCache:
    """Keys and values of every layer, (L, 2, B, H, S, D), written in place at given positions."""

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        num_positions: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, num_positions, head_size)
        self.entries = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def num_positions(self) -> int:
        return self.entries.size(4)

    def first(self, num_positions: int) -> KVCache:
        """The first positions, sharing memory: attention then reads no further than it must."""
        view = copy.copy(self)
        view.entries = self.entries[..., :num_positions, :]
        return view

    def resized(self, rows: Sequence[int], num_positions: int) -> KVCache:
        """A copy with room for so many positions and only the given rows of the batch.

        A row may be given more than once: so a shared prefix is laid out for many.
        """
        chosen = copy.copy(self)
        L, _, _, H, S, D = self.entries.shape
        S = min(S, num_positions)
        chosen.entries = self.entries.new_zeros(L, 2, len(rows), H, num_positions, D)
        chosen.entries[..., :S, :] = self.entries[:, :, rows, :, :S]
        return chosen

    def write(self, layer: int, positions: Tensor, new: Tensor) -> Tensor:
        """Put one layer's new keys and values (B, T, 2, H, D) at `positions` (B, T).

        Returns all of the layer's, (2, B, H, S, D).
        """
        entries = self.entries[layer]
        if len(positions) == 1:  # the same in fewer operations, which count for a single row
            entries.index_copy_(3, positions[0], new.permute(2, 0, 3, 1, 4))
        else:
            rows = torch.arange(len(positions), device=positions.device)[:, None]
            entries[:, rows, :, positions] = new
        return entries


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, under nanoGPT's parameter names."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout

    def forward(
        self, x: Tensor, positions: Tensor | None, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None and positions is not None:
            key, value = cache.write(self.layer, positions, qkv[:, :, 1:])  # (B, H, S, D)
        y = _attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def forward_shared(self, x: Tensor, num_rows: int, is_visible: Tensor) -> Tensor:
        """Attention where every row follows the same prefix, which is there only once.

        x is flat, (P + B T, C): the prefix's P tokens, then B = num_rows rows of T; `is_visible`
        (T, P + T) says what a row's token sees of the prefix and its own row.
        """
        T, P = is_visible.size(0), is_visible.size(1) - is_visible.size(0)
        B, H, D = num_rows, self.n_head, x.size(1) // self.n_head
        qkv = self.c_attn(x).split(H * D, dim=1)  # one product for prefix and rows
        # Splits, not slices: their gradients are put together by copying each part once.
        parts = [part.split([P, B * T]) for part in qkv]
        first_q, first_k, first_v = (part[0].view(1, P, H, D).transpose(1, 2) for part in parts)
        row_q, row_k, row_v = (part[1].view(B, T, H, D).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        first_y = _attend(first_q, first_k, first_v, None, dropout)  # (1, H, P, D)
        key = torch.cat([first_k.expand(B, H, P, D), row_k], dim=2)  # (B, H, P + T, D)
        value = torch.cat([first_v.expand(B, H, P, D), row_v], dim=2)
        row_y = _attend(row_q, key, value, is_visible, dropout)  # (B, H, T, D)
        y = torch.cat([part.transpose(1, 2).reshape(-1, H * D) for part in (first_y, row_y)])
        return self.resid_dropout(self.c_proj(y))

    def forward_packed(self, x: Tensor, bounds: Tensor, prefix_length: int) -> Tensor:
        """The same for rows of any lengths, end to end in x (N, C) after the prefix.

        `bounds` (2, N) are those of `packed_attention.row_bounds`. What it returns, (N, C), is not
        dropped yet.
        """
        from fc_lightning.packed_attention import packed_attention  # Triton is not everywhere

        y = packed_attention(
            self.c_attn(x),
            bounds,
            num_heads=self.n_head,
            prefix_length=prefix_length,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.c_proj(y)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Attention of queries (B, H, T, D) to keys and values (B, H, S, D), causal without a mask.

    A mask is boolean, True where a query sees a key, or what is added to their scores.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or not query.requires_grad:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
        )
    # torch 2.13's fused kernel for CPUs takes 189 ms there and back for 64 rows of 80 tokens in
    # bf16, written out it takes 33 (one thread, AVX-512).
    if mask is None:
        mask = query.new_ones(query.size(2), key.size(2), dtype=torch.bool).tril()
    scores = (query / math.sqrt(query.size(3))) @ key.transpose(2, 3)  # (B, H, T, S)
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(dim=3)
    return F.dropout(weights, dropout).to(value.dtype) @ value


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, positions: Tensor | None, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), positions, cache, mask)
        return x + self.mlp(self.ln_2(x))

    def forward_shared(self, x: Tensor, num_rows: int, is_visible: Tensor) -> Tensor:
        x = x + self.attn.forward_shared(self.ln_1(x), num_rows, is_visible)
        return x + self.mlp(self.ln_2(x))

    def forward_packed(
        self, x: Tensor, branch: Tensor, bounds: Tensor, prefix_length: int
    ) -> tuple[Tensor, Tensor]:
        """Packed rows through the block; see `CausalSelfAttention.forward_packed`.

        What the block before adds to x (N, C) comes beside it, not dropped yet, as `branch` (N, C)
        in the dtype of products, and what this one adds goes out so. Thus dropout, sum and the
        norm after them are one kernel, at a block's end too.
        """
        dropout = self.attn.dropout if self.training else 0.0
        x, normed = _add_norm(x, branch, self.ln_1, dropout)
        branch = self.attn.forward_packed(normed, bounds, prefix_length)
        x, normed = _add_norm(x, branch, self.ln_2, dropout)
        return x, self.mlp.c_proj(self.mlp.gelu(self.mlp.c_fc(normed)))


def _add_norm(x: Tensor, branch: Tensor, norm: LayerNorm, dropout: float) -> tuple[Tensor, Tensor]:
    """x + dropout(branch), and that normalized, all (N, C)."""
    from fc_lightning.kernels import add_norm

    return add_norm(x, branch, norm.weight, norm.bias, dropout)


class GPT(nn.Module):
    """GPT-2. Parameters are named and tied as nanoGPT names and ties them.

    >>> model = GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=1, n_head=2, n_embd=8))
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer: Any = nn.ModuleDict(  # Any: attributes of a ModuleDict have no types
            {
                "wte": wte,
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        wte.weight = self.lm_head.weight
        self.apply(_init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2 scales residual projections by depth
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(
        self, ids: Tensor, *, positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Token ids (B, T) to logits (B, T, V). See `hidden_states` for the other arguments."""
        return self.lm_head(self.hidden_states(ids, positions=positions, cache=cache))

    def hidden_states(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        run_block: Callable[..., Tensor] = Block.forward,
    ) -> Tensor:
        """Token ids (B, T) to the states (B, T, C) that `lm_head` turns into logits.

        With a cache, `positions` (B, T) says where each token stands in its row; keys and values
        are written there, and a token sees every cached position up to its own. Rows may stand at
        different positions, so prompts of unequal length need no left padding: what is written
        beyond a row's end is overwritten before any token can see it.

        `run_block` runs a block in its own way, compiled for instance.

        Raises:
            ValueError: more tokens than the model has positions.
        """
        if ids.size(1) > self.config.block_size:
            raise ValueError(
                f"{ids.size(1)} tokens, but the model has {self.config.block_size} positions"
            )
        mask = None
        if cache is not None:
            assert positions is not None, "with a cache, say where the tokens stand"
            seen = torch.arange(cache.num_positions, device=ids.device)
            is_visible = seen <= positions[:, None, :, None]  # (B, 1, T, S)
            # Added to the scores; of a boolean mask each layer would make this anew.
            mask = cache.entries.new_zeros(()).where(is_visible, -torch.inf)
        where = torch.arange(ids.size(1), device=ids.device) if positions is None else positions
        x = self.transformer.drop(self.transformer.wte(ids) + self.transformer.wpe(where))
        for block in self.transformer.h:
            x = run_block(block, x, positions, cache, mask)
        return self.transformer.ln_f(x)

    def hidden_states_after(
        self,
        prefix: Tensor,
        ids: Tensor,
        *,
        run_block: Callable[..., Tensor] = Block.forward_shared,
    ) -> Tensor:
        """States (B, T, C) of rows (B, T) that all follow the same prefix (P,).

        The same as `hidden_states` of each row with the prefix before it, less the prefix's own
        states, but the prefix goes through the network once for all rows; gradients flow
        through it. With dropout, all rows share the prefix's dropout mask.

        Raises:
            ValueError: prefix and row together have more tokens than the model has positions.
        """
        (B, T), P = ids.shape, prefix.size(0)
        if P + T > self.config.block_size:
            raise ValueError(
                f"{P + T} tokens, but the model has {self.config.block_size} positions"
            )
        where = torch.arange(P + T, device=ids.device)
        is_visible = where <= where[P:, None]  # (T, P + T)
        tokens = self.transformer.wte(torch.cat([prefix, ids.flatten()]))  # (P + B T, C)
        at = torch.cat([where[:P], where[P:].repeat(B)])
        x = self.transformer.drop(tokens + self.transformer.wpe(at))
        for block in self.transformer.h:
            x = run_block(block, x, B, is_visible)
        return self.transformer.ln_f(x[P:]).view(B, T, -1)

    @property
    def can_pack(self) -> bool:
        """Whether `hidden_states_packed` can be computed: on a GPU of 2020 or later, by Triton."""
        weight = self.lm_head.weight
        if not weight.is_cuda or weight.dtype == torch.float64 or find_spec("triton") is None:
            return False
        is_new = torch.cuda.get_device_capability(weight.device) >= (8, 0)
        return is_new and self.config.n_embd // self.config.n_head <= 128  # what tiles can hold

    def hidden_states_packed(
        self,
        prefix: Tensor,
        ids: Tensor,
        starts: Tensor,
        *,
        run_block: Callable[..., tuple[Tensor, Tensor]] = Block.forward_packed,
    ) -> Tensor:
        """States (R, C) of rows that lie end to end in `ids` (R,) and all follow one prefix (P,).

        The same as `hidden_states_after`, but nothing is padded. Row i begins at `starts`[i],
        (B + 1,), and the last of them is where the last row ends; what comes after it is of no
        use to anyone. The prefix may be empty.
        """
        from fc_lightning.packed_attention import row_bounds

        P, R = len(prefix), len(ids)
        bounds = row_bounds(starts, prefix_length=P, num_tokens=R)  # (2, P + R)
        positions = torch.arange(P + R, device=ids.device) - bounds[0]
        positions[P:] += P
        tokens = self.transformer.wte(torch.cat([prefix, ids]))
        x = self.transformer.drop(tokens + self.transformer.wpe(positions))
        # Nothing is added before the first block; it is compiled as the others are.
        is_autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype
        branch = torch.zeros_like(x, dtype=dtype)
        for block in self.transformer.h:
            x, branch = run_block(block, x, branch, bounds, P)
        dropout = self.config.dropout if self.training else 0.0
        return _add_norm(x, branch, self.transformer.ln_f, dropout)[1][P:]

    def num_parameters(self) -> int:
        """How many weights, the tied head counted once; position embeddings included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_flops(self, num_tokens: int, num_pairs: int, num_logits: int) -> int:
        """Floating-point operations of one forward pass, as few as the arithmetic allows.

        `num_tokens` go through the blocks, `num_pairs` (query, key) pairs through attention and
        `num_logits` states through the head. A training step takes three times as many.
        Source: Kaplan et al. 2020, table 1, without its shortcut for the head.
        """
        per_token = 2 * sum(w.numel() for w in self.transformer.h.parameters() if w.dim() >= 2)
        per_pair = 4 * self.config.n_layer * self.config.n_embd  # q k, and weights times v
        return (
            num_tokens * per_token
            + num_pairs * per_pair
            + num_logits * 2 * self.lm_head.weight.numel()
        )

    def crop_block_size(self, block_size: int) -> None:
        """Keep only the first `block_size` positions.

        Raises:
            ValueError: the model has fewer positions than that, or `block_size` is below 1.
        """
        if block_size > self.config.block_size:
            raise ValueError(
                f"block_size {block_size} exceeds the checkpoint's {self.config.block_size} "
                "positions; lower block_size"
            )
        self.config = dataclasses.replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        wpe.num_embeddings = block_size


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
