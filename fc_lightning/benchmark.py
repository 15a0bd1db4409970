"""How fast a model answers, measured in one run beside the ways it is measured against.

Models have random weights, whose speed is that of trained ones. What they answer is dictated, so
that every way of decoding writes the same typical calls and takes as many decisions as they need.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fc_lightning.caller import fastest_num_threads, find_device, quantize_int8
from fc_lightning.chat import decode_response, encode_command, encode_example, make_example
from fc_lightning.decoding import generate, prefill
from fc_lightning.functions import FunctionCall, load_registry
from fc_lightning.gpt import GPT, GPTConfig
from fc_lightning.grammar import Place, compile_grammar
from fc_lightning.tokenizer import PAD

SHAPES = {
    "tiny": GPTConfig(n_layer=4, n_head=4, n_embd=128, bias=False),
    "20M": GPTConfig(n_layer=8, n_head=8, n_embd=256, bias=False),
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768, bias=False),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024, bias=False),
}
_DICTATION = (
    ("Make it warmer in the back",
     "adjust_temperature", {"action": "increase", "area": ["rear-right", "rear-left"]}),
    ("Set the temperature to 21 degrees on my side, please",
     "set_temperature", {"temperature": 21, "area": ["driver"]}),
    ("Turn the fan up for everyone",
     "adjust_fan_speed",
     {"speed": "increase", "area": ["driver", "front-passenger", "rear-right", "rear-left"]}),
    ("Set the fan to low", "set_fan_speed", {"speed": "low"}),
    ("Could you close the rear left window?",
     "control_window", {"window_position": "close", "window_location": "rear_left"}),
    ("Lock the doors", "lock_doors", {"lock_state": "lock"}),
    ("Play some jazz at volume 4", "play_music", {"track": "jazz", "volume": 4}),
    ("Take me to the main station", "set_navigation_destination", {"destination": "main station"}),
    ("Change the fan speed for the passenger",
     "possibly_incomplete_set_fan_speed", {"speed": "", "area": ["front-passenger"]}),
    ("Defrost the rear window for ten minutes",
     "activate_defroster", {"defroster_zone": "rear", "duration_minutes": 10}),
    ("Hold 110 from here on", "set_cruise_control", {"speed": 110}),
    ("I would like the ambient light a bit more blue",
     "control_ambient_lighting", {"color": "blue"}),
)  # fmt: skip
_COMMANDS = tuple(command for command, _, _ in _DICTATION)
_RESPONSES = tuple(
    encoded.ids[encoded.num_prompt_tokens :]
    for encoded in (
        encode_example(make_example(command, FunctionCall(name, arguments)))
        for command, name, arguments in _DICTATION
    )
)
_NUM_TOKENS = round(statistics.mean(map(len, _RESPONSES)))  # of a response, where it can't end

_TRANSFORMERS, _NO_CACHE = "transformers", "no cache"

Answer = Callable[[Sequence[int]], object]  # answers the commands with these numbers, all at once


@dataclass(frozen=True)
class Timing:
    """One row of the table: how fast one model answers in one way."""

    model: str  # its shape, and on a CPU how many threads it was given
    way: str
    ms_per_call: float  # the median of single commands
    calls_per_s: float | None  # of many commands; None where that would take too long


@dataclass(frozen=True)
class _Dictated:
    """A place in a response whose choices are made beforehand, whatever the model prefers."""

    place: Place
    ids: Sequence[int]  # the response from here on

    @property
    def forced(self) -> Sequence[int]:
        return self.place.forced

    @property
    def allowed(self) -> Tensor:
        return self.place.allowed

    def after(self, token: int) -> _Dictated:
        num_forced = len(self.place.forced)
        return _Dictated(self.place.after(self.ids[num_forced]), self.ids[num_forced + 1 :])


def use_device(name: str) -> torch.device:
    """The device of a name, made the one that is waited for, and whose memory is measured.

    Raises:
        ValueError: there is no such device, or it can't be used.
    """
    device = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def benchmark_decode(
    shapes: Sequence[str] = ("20M", "gpt2"),
    *,
    device: str = "auto",
    num_commands: int | None = None,
    seconds: float = 10.0,
    console: Console | None = None,
) -> list[Timing]:
    """Time each way of decoding that the device and the installed packages allow; print a table.

    "Many" are `num_commands`, by default 2,048 on a GPU and 32 on a CPU. No measurement is
    repeated once it has taken `seconds`. On a CPU, all ways have as many threads as a
    FunctionCaller takes for the shape.

    Raises:
        ValueError: a shape that is not in `SHAPES`, an unknown device, or no commands.
    """
    if unknown := set(shapes) - set(SHAPES):
        raise ValueError(f"there is no shape {min(unknown)!r}; choose from {', '.join(SHAPES)}")
    device = use_device(device).type
    if num_commands is None:
        num_commands = 2048 if device == "cuda" else 32
    if num_commands < 1:
        raise ValueError(f"num_commands must be at least 1, not {num_commands}")
    many = [n % len(_COMMANDS) for n in range(num_commands)]
    timings, most_threads = [], torch.get_num_threads()
    for shape in shapes:
        torch.manual_seed(0)
        model, name = GPT(SHAPES[shape]).eval(), shape
        if device == "cpu":
            torch.set_num_threads(num_threads := fastest_num_threads(model))
            name = f"{shape}, {num_threads} thread{'s' if num_threads > 1 else ''}"
        for way, answer, is_slow in _ways(model, device):
            ms_per_call = 1e3 * _time(answer, [[n] for n in range(len(_COMMANDS))], seconds)
            calls_per_s = None if is_slow else len(many) / _time(answer, [many] * 2, seconds)
            timings.append(Timing(name, way, ms_per_call, calls_per_s))
        torch.set_num_threads(most_threads)
    (console or Console()).print(_table(timings, device))
    return timings


def _ways(model: GPT, device: str) -> Iterator[tuple[str, Answer, bool]]:
    """Name, function, and whether it is too slow for many commands, of each way to decode."""
    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        answer = _ours(copy.deepcopy(model).to(device, dtype), is_constrained=True)
        yield f"constrained, {short}", answer, False
    if device == "cpu":
        quantized = quantize_int8(copy.deepcopy(model))
        yield "constrained, int8", _ours(quantized, is_constrained=True), False
    dtype, short = (torch.float32, "fp32") if device == "cpu" else (torch.bfloat16, "bf16")
    model = model.to(device, dtype)
    yield f"unconstrained, {short}", _ours(model, is_constrained=False), False
    if importlib.util.find_spec("transformers") is not None:
        yield f"{_TRANSFORMERS}, {short}", _transformers(model), False
    yield f"{_NO_CACHE}, {short}", _without_cache(model), True


def _ours(model: GPT, *, is_constrained: bool) -> Answer:
    first = compile_grammar(load_registry())
    prefix = prefill(model, encode_command("?")[:-8])

    def answer(numbers: Sequence[int]) -> None:
        numbers = sorted(numbers, key=lambda n: len(_COMMANDS[n]))
        for batch in _batches(numbers):
            generations = generate(
                model,
                [encode_command(_COMMANDS[n]) for n in batch],
                max_new_tokens=128 if is_constrained else _NUM_TOKENS,
                allow=[_Dictated(first, _RESPONSES[n]) for n in batch] if is_constrained else None,
                prefix=prefix,
            )
            for generation in generations:
                decode_response(generation.ids)

    if is_constrained:  # as in a caller that has been in use, whose grammar remembers the ways
        answer(range(len(_COMMANDS)))
    return answer


def _transformers(model: GPT) -> Answer:
    """A model of the same shape in transformers, decoding greedily with its key/value cache."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape, weight = model.config, model.lm_head.weight
    config = GPT2Config(
        vocab_size=shape.vocab_size, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd
    )
    other = GPT2LMHeadModel(config).eval().to(weight.device, weight.dtype)

    def answer(numbers: Sequence[int]) -> None:
        for batch in _batches(numbers):
            prompts = [encode_command(_COMMANDS[n]) for n in batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
            ids = ids.to(weight.device)
            num_tokens = {"min_new_tokens": _NUM_TOKENS, "max_new_tokens": _NUM_TOKENS}
            other.generate(
                ids,
                attention_mask=(ids != PAD).long(),
                do_sample=False,
                pad_token_id=PAD,
                **num_tokens,
            ).tolist()

    return answer


def _without_cache(model: GPT) -> Answer:
    """nanoGPT's loop: the whole sequence goes through the network again for every token."""

    @torch.inference_mode()
    def answer(numbers: Sequence[int]) -> None:
        for n in numbers:
            ids = torch.tensor([encode_command(_COMMANDS[n])], device=model.lm_head.weight.device)
            for _ in range(_NUM_TOKENS):
                logits = model.lm_head(model.hidden_states(ids)[:, -1:])
                ids = torch.cat([ids, logits.argmax(dim=-1)], dim=1)
            ids.tolist()

    return answer


def _batches(numbers: Sequence[int], size: int = 512) -> Iterator[Sequence[int]]:
    yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def _time(answer: Answer, batches: Sequence[Sequence[int]], seconds: float) -> float:
    """The median time of the batches in seconds, after one to warm up."""
    times: list[float] = []
    start = time.perf_counter()
    for batch in (batches[0], *batches):
        if times and time.perf_counter() - start > seconds:
            break
        begin = time.perf_counter()
        answer(batch)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)


def _table(timings: Sequence[Timing], device: str) -> Table:
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    table = Table(
        title=f"{where}, torch {torch.__version__}, {_NUM_TOKENS} tokens a response",
        caption="ms: median of single commands; x: times as fast as transformers' generate (HF) "
        "and as a full forward pass a token",
    )
    columns = ("model", "way", "ms", "x HF", "x no cache", "calls/s of many", "x HF")
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "way") else "right")
    for model, rows in itertools.groupby(timings, key=lambda timing: timing.model):
        group = list(rows)
        hf = next((t for t in group if t.way.startswith(_TRANSFORMERS)), None)
        no_cache = next(t for t in group if t.way.startswith(_NO_CACHE))
        for t in group:
            table.add_row(
                model,
                t.way,
                f"{t.ms_per_call:,.1f}",
                _times(hf.ms_per_call if hf else None, t.ms_per_call),
                _times(no_cache.ms_per_call, t.ms_per_call),
                f"{t.calls_per_s:,.1f}" if t.calls_per_s else "",
                _times(t.calls_per_s, hf.calls_per_s if hf else None),
            )
        table.add_section()
    return table


def _times(more: float | None, less: float | None) -> str:
    return f"{more / less:.3g}" if more and less else ""
