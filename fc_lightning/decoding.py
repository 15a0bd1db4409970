"""From prompts to responses: prefill, decode, and which of the allowed tokens comes next.

Rows of unequal length share a batch, each leaves it when its response ends, and what need not be
asked is not: forced tokens are fed together with the choice before them, and only the allowed rows
of the vocabulary head are computed. What is allowed is decided elsewhere (grammar.py); nothing
here knows of functions or JSON.

Shapes: B batch, T tokens fed at once, K allowed ids, V vocabulary, C width.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fc_lightning.gpt import GPT, KVCache
from fc_lightning.tokenizer import END_OF_TEXT

_SPARE_POSITIONS = 32  # how far the cache grows at once


class Allow(Protocol):
    """What may come next at one place in a response; never changed, so rows can share it."""

    @property
    def forced(self) -> Sequence[int]:
        """Ids that must come now; the model is not asked about them."""

    @property
    def allowed(self) -> Tensor | None:
        """The ids (K,) one of which follows the forced ones, or, where they are very many, a
        boolean mask (V,). Empty: the response is over. None: anything goes."""

    def after(self, token: int) -> Allow:
        """Where the response stands once `token` has been chosen."""


@dataclass(frozen=True)
class Anything:
    """No constraint: nothing is forced, every token is allowed."""

    forced: tuple[int, ...] = ()
    allowed: None = None

    def after(self, token: int) -> Anything:
        return self


def num_decisions(allow: Allow, ids: Sequence[int]) -> int | None:
    """How many choices it takes to write a whole response's `ids`; None if it can't be written."""
    start, count = 0, 0
    while list(ids[start : start + len(allow.forced)]) == list(allow.forced):
        start, allowed = start + len(allow.forced), allow.allowed
        is_over = allowed is not None and not allowed.numel()
        if is_over or start == len(ids):
            return count if is_over and start == len(ids) else None
        token = ids[start]
        if allowed is not None and not (
            allowed[token] if allowed.dtype == torch.bool else (allowed == token).any()
        ):
            return None
        allow, start, count = allow.after(token), start + 1, count + 1
    return None


@dataclass(frozen=True)
class Prefix:
    """Tokens with which many prompts begin, put through the network once."""

    ids: Sequence[int]
    cache: KVCache  # one row


@dataclass(frozen=True)
class Generation:
    """One response: its ids, END_OF_TEXT included if it was reached.

    `log_probability` is that of the choices made among what was allowed (forced tokens cost
    nothing), at temperature 1; `num_decisions` is how many there were.
    """

    ids: list[int]
    log_probability: float
    num_decisions: int

    @property
    def is_finished(self) -> bool:
        return self.ids[-1:] == [END_OF_TEXT]


@dataclass
class _Row:
    """A response in the making: `ids` is prompt and response, the first `num_cached` known."""

    place: int  # in the caller's list of prompts
    ids: list[int]
    num_prompt: int
    num_cached: int
    allow: Allow
    log_probability: float = 0.0
    num_decisions: int = 0
    is_done: bool = False

    def extend(self, ids: Sequence[int], max_new_tokens: int) -> None:
        room = max_new_tokens - (len(self.ids) - self.num_prompt)
        self.ids += ids[:room]
        allowed = self.allow.allowed
        is_over = allowed is not None and not allowed.numel()
        self.is_done = is_over or len(ids) >= room or self.ids[-1] == END_OF_TEXT

    def generation(self) -> Generation:
        return Generation(self.ids[self.num_prompt :], self.log_probability, self.num_decisions)


@torch.inference_mode()
def prefill(model: GPT, ids: Sequence[int]) -> Prefix:
    """Put the shared beginning of many prompts through the network, once for all of them."""
    device, dtype = model.transformer.wte.weight.device, model.transformer.wte.weight.dtype
    if torch.is_autocast_enabled(device.type):  # keys and values then come in its precision
        dtype = torch.get_autocast_dtype(device.type)
    cache = KVCache(model.config, 1, len(ids), device=device, dtype=dtype)
    if ids:
        tokens = torch.tensor([list(ids)], device=device)
        positions = torch.arange(len(ids), device=device)[None]
        model.hidden_states(tokens, positions=positions, cache=cache)
    return Prefix(ids, cache)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    allow: Allow | Sequence[Allow] | None = None,
    prefix: Prefix | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Generation]:
    """Continue each prompt (token ids) until END_OF_TEXT, all of them in one batch.

    Greedy at temperature 0, else sampled with `generator` (on the model's device). `allow` is for
    all rows or a sequence with one for each. A `prefix` from `prefill` spares its tokens; rows
    that begin otherwise are still decoded right.

    Raises:
        ValueError: a prompt is empty, or prompt and response may not fit into the model.
    """
    if not prompts:
        return []
    _check_lengths(prompts, max_new_tokens, model.config.block_size)
    heads = [prefix.ids if prefix else (), *(prompt[:-1] for prompt in prompts)]
    columns = itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*heads, strict=False))
    num_shared = len(list(columns))  # never a prompt's last token, whose state is asked for
    allows = allow if isinstance(allow, Sequence) else [allow or Anything()] * len(prompts)
    rows = [
        _Row(place, list(prompt), len(prompt), num_shared, allowing)
        for place, (prompt, allowing) in enumerate(zip(prompts, allows, strict=True))
    ]
    for row in rows:
        row.extend(row.allow.forced, max_new_tokens)
    results = {row.place: row for row in rows}
    shared = (prefix or prefill(model, [])).cache.first(num_shared)
    longest = max(len(row.ids) for row in rows)
    cache = shared.resized([0] * len(rows), _in_eights(longest + _SPARE_POSITIONS))
    while not all(row.is_done for row in rows):
        rows, cache = _fit(rows, cache)
        states = _feed(model, rows, cache)
        going_on = [place for place, row in enumerate(rows) if not row.is_done]
        choices = choose(
            model,
            states[going_on],
            [rows[place].allow.allowed for place in going_on],
            temperature=temperature,
            generator=generator,
        )
        for place, (token, log_probability) in zip(going_on, choices, strict=True):
            row = rows[place]
            row.allow = row.allow.after(token)
            row.log_probability += log_probability
            row.num_decisions += 1
            row.extend([token, *row.allow.forced], max_new_tokens)
    return [results[place].generation() for place in range(len(prompts))]


def choose(
    model: GPT,
    states: Tensor,
    allowed: Sequence[Tensor | None],
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[tuple[int, float]]:
    """For each row of states (B, C) an id, and its log-probability among what the row allows."""
    chosen: dict[int, tuple[int, float]] = {}
    for rows in _alike(allowed):
        some = states if len(rows) == len(allowed) else states[rows]
        logits, ids = _logits(model, some, [allowed[row] for row in rows])
        if temperature > 0:
            chances = (logits / temperature).softmax(dim=-1)
            picks = torch.multinomial(chances, 1, generator=generator)  # (B, 1)
        else:
            picks = logits.argmax(dim=-1, keepdim=True)
        log_probabilities = logits.log_softmax(dim=-1).gather(1, picks)[:, 0].tolist()
        tokens = (picks if ids is None else ids.gather(1, picks))[:, 0].tolist()
        chosen |= zip(rows, zip(tokens, log_probabilities, strict=True), strict=True)
    return [chosen[row] for row in range(len(allowed))]


def _alike(allowed: Sequence[Tensor | None]) -> list[list[int]]:
    """The rows that allow anything, those with masks and those with ids, each if there are any."""
    kinds = [None if ids is None else ids.dtype for ids in allowed]
    return [[row for row, k in enumerate(kinds) if k == kind] for kind in dict.fromkeys(kinds)]


def _logits(
    model: GPT, states: Tensor, allowed: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Logits, -inf where not allowed, and the ids (B, K) that they are for, None for all (B, V).

    Of ids, only their rows of the vocabulary head are computed, and in float32: a model in bf16
    then answered 12 of 545 commands otherwise than one in float32, and 29 with the head in bf16.
    """
    given = [ids for ids in allowed if ids is not None]
    if not given:
        return model.lm_head(states).float(), None
    if given[0].dtype == torch.bool:
        logits = model.lm_head(states).float()
        is_allowed = torch.stack(given)[:, : logits.size(1)].to(logits.device)
        return logits.masked_fill(~is_allowed, -torch.inf), None
    ids = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=-1)
    ids = ids.to(states.device)
    head = model.transformer.wte.weight[ids.clamp(min=0)].float()  # (B, K, C), tied to wte
    logits = (head @ states.float()[:, :, None])[:, :, 0]
    return logits.masked_fill(ids < 0, -torch.inf), ids


def _feed(model: GPT, rows: list[_Row], cache: KVCache) -> Tensor:
    """Put each row's unknown tokens through the network; the state (B, C) after its last one.

    Rows differ in how many tokens they must feed, so each feeds its last T: a token fed again
    writes the same key and value, and every row's last token stands in the last column.
    """
    device = cache.entries.device
    T = max(1, *(len(row.ids) - row.num_cached for row in rows if not row.is_done))
    ends = [len(row.ids) for row in rows]
    fed = [[row.ids[0]] * (T - end) + row.ids[-T:] for row, end in zip(rows, ends, strict=True)]
    ids = torch.from_numpy(np.array(fed))  # a quarter of the time that torch.tensor takes
    positions = torch.tensor(ends)[:, None] + torch.arange(-T, 0)  # (B, T)
    with _without_cudnn_attention() if device.type == "cuda" else contextlib.nullcontext():
        states = model.hidden_states(
            ids.to(device),
            positions=positions.clamp(min=0).to(device),
            cache=cache.first(_in_eights(max(ends))),
        )
    for row, end in zip(rows, ends, strict=True):
        row.num_cached = end
    return states[:, -1]


class _WithoutCudnnAttention:
    """cuDNN makes a plan for every new shape of attention, as nearly every pass here has.

    The switch is the whole process's: the last of several threads turns it back.
    """

    def __init__(self) -> None:
        self._lock, self._num_threads = threading.Lock(), 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._num_threads += 1
            if self._num_threads == 1:
                others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
                self._switch = sdpa_kernel([*others, SDPBackend.MATH])
                self._switch.__enter__()
        try:
            yield
        finally:
            with self._lock:
                self._num_threads -= 1
                if not self._num_threads:
                    self._switch.__exit__(None, None, None)


_without_cudnn_attention = _WithoutCudnnAttention()


def _fit(rows: list[_Row], cache: KVCache) -> tuple[list[_Row], KVCache]:
    """Drop finished rows and make room for the unknown tokens of the others.

    Either copies the cache, so rows are dropped by a quarter or more at once.
    """
    going_on = [place for place, row in enumerate(rows) if not row.is_done]
    num_positions = max(len(row.ids) for row in rows)
    if len(going_on) > 0.75 * len(rows) and num_positions <= cache.num_positions:
        return rows, cache
    cache = cache.resized(going_on, _in_eights(num_positions + _SPARE_POSITIONS))
    return [rows[i] for i in going_on], cache


def _in_eights(num_positions: int) -> int:
    """Rounded up: attention's kernels want masks whose rows are multiples of eight."""
    return -(-num_positions // 8) * 8


def _check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, block_size: int) -> None:
    if not all(prompts):
        raise ValueError("a prompt is empty; it must hold at least one token")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > block_size:
        raise ValueError(
            f"a prompt of {longest} tokens and up to {max_new_tokens} new ones exceed the model's "
            f"{block_size} positions; shorten the text or lower max_new_tokens"
        )
