"""nanoGPT's model, written from the paper and its parameter names without fc_lightning.

Attention, normalization and GELU are spelled out, and the config rejects unknown keys as nanoGPT's
does, so that a checkpoint which loads here strictly, with equal logits, is a nanoGPT checkpoint.
"""

import dataclasses
import math

import torch
from torch import nn


@dataclasses.dataclass
class NanoConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True


class NanoNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5
                                                   ).sqrt()  # fmt: skip
        return scaled * self.weight + (0 if self.bias is None else self.bias)


class NanoAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head

    def forward(self, x):
        heads = [h.chunk(self.n_head, dim=-1) for h in self.c_attn(x).chunk(3, dim=-1)]
        is_later = torch.ones(x.size(1), x.size(1)).triu(1).bool()
        outs = []
        for query, key, value in zip(*heads, strict=True):
            scores = query @ key.transpose(1, 2) / math.sqrt(query.size(-1))
            outs.append(scores.masked_fill(is_later, -math.inf).softmax(-1) @ value)
        return self.c_proj(torch.cat(outs, dim=-1))


class NanoBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = NanoNorm(config), NanoNorm(config)
        self.attn = NanoAttention(config)
        self.mlp = nn.ModuleDict({
            "c_fc": nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias),
            "c_proj": nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias),
        })  # fmt: skip

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


class NanoGPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList([NanoBlock(config) for _ in range(config.n_layer)]),
            "ln_f": NanoNorm(config),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.size(1)))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))
