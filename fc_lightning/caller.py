"""FunctionCaller: what a person says in, a function call that satisfies its schema out.

The public way to use a fine-tuned model: it holds the model, the grammar of its functions and the
system prompt's keys and values, which all calls share. Nothing of Lightning is imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from fc_lightning.calls import FunctionCall, parse_call, value_key
from fc_lightning.chat import SYSTEM, decode_response, encode_command, harmless, render_response
from fc_lightning.checkpoint import load_gpt, load_registry_source
from fc_lightning.decoding import Allow, generate, prefill
from fc_lightning.functions import Registry, load_registry, registry_from_source
from fc_lightning.gpt import GPT
from fc_lightning.grammar import MAX_TEXT_TOKENS, Place, compile_grammar, max_response_tokens
from fc_lightning.verbatim import narrowed

_MIN_PROMPT_TOKENS = 96  # what a response must leave free; prompts take about 75
_MIN_TEXT_TOKENS = 24


class CommandError(ValueError):
    """A command that can't be answered: `problem` says why, `number` which it is, of many."""

    def __init__(self, problem: str, *, number: int | None) -> None:
        self.problem, self.number = problem, number
        super().__init__(problem if number is None else f"command {number}: {problem}")


class IncompleteCall(ValueError):
    """A call that lacks required arguments; `missing` says which to ask for."""

    def __init__(self, call: FunctionCall) -> None:
        self.call, self.missing = call, call.missing
        super().__init__(f"{call.function} needs {', '.join(self.missing)}, which was not said")


class UnknownHandler(LookupError):
    """A call of a function for which `execute` was given nothing to run."""


@dataclass(frozen=True)
class Response:
    """What the model said, and the probability of the choices it made."""

    text: str
    confidence: float


class _Copying:
    """A place of the grammar, where what is called verbatim is copied from one command."""

    def __init__(
        self, place: Place, command: str, registry: Registry, *, follows_text: bool = False
    ) -> None:
        self._place, self._command, self._registry = place, command, registry
        self.forced = place.forced
        # A letter may take several tokens, after the first of which few are allowed.
        self._may_be_in_text = follows_text or place.allowed.dtype == torch.bool

    @functools.cached_property
    def allowed(self) -> Tensor:
        if not self._may_be_in_text:
            return self._place.allowed
        place = self._place
        return narrowed(place.allowed, place.ids, self._command, self._registry)

    def after(self, token: int) -> _Copying:
        place = self._place.after(token)
        follows_text = self._may_be_in_text
        return _Copying(place, self._command, self._registry, follows_text=follows_text)


class FunctionCaller:
    """Turns what people say into calls of a registry's functions; safe to share among threads.

    >>> caller = FunctionCaller.from_checkpoint("outputs/checkpoints/best.ckpt")  # doctest: +SKIP
    >>> caller("make it warmer in the back")  # doctest: +SKIP
    FunctionCall(name='adjust_temperature', arguments={'action': 'increase', ...
    """

    def __init__(self, model: GPT, registry: Registry, *, batch_size: int | None = None) -> None:
        """Answer with `model` as it is, wherever it is; it is put into evaluation mode.

        Up to `batch_size` commands are decoded at once: 512 on a GPU, else 64, unless given.

        Raises:
            ValueError: the model has too few positions for a prompt and a call.
        """
        self.model, self.registry = model.eval(), registry
        max_text_tokens = _max_text_tokens(registry, model.config.block_size)
        self._max_new_tokens = max_response_tokens(registry, max_text_tokens=max_text_tokens)
        self._grammar = compile_grammar(registry, max_text_tokens=max_text_tokens)
        parameters = [p for function in registry.functions for p in function.parameters]
        self._has_open_arrays = any(p.type == "array" and not p.enum for p in parameters)
        self._has_verbatim = any(p.is_verbatim for p in parameters)
        self._prefix = prefill(model, _shared_prompt())
        is_gpu = model.transformer.wte.weight.is_cuda
        self._batch_size = batch_size or (512 if is_gpu else 64)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path = "vehicle",
        *,
        functions: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        int8: bool = False,
        batch_size: int | None = None,
    ) -> FunctionCaller:
        """Load a checkpoint in any format that `load_gpt` reads; without one, the tuned one that
        ships, which knows the vehicle's functions.

        On a CPU, torch is set to the number of threads with which the model answers soonest.

        Args:
            functions: the domain's YAML file; by default the one inside the checkpoint, or the
                vehicle's if it holds none.
            device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
            dtype: "float32", "bfloat16" or "float16"; "auto" takes bfloat16 where the hardware
                computes in it.
            int8: compute with weights of 8 bits, on the CPU only: the fastest there.
            batch_size: commands decoded at once; by default 512 on a GPU, else 64.

        Raises:
            ValueError: the file, the device or the dtype can't be used; the message says why.
        """
        registry = _find_registry(path, functions)
        where = find_device(device)
        model = load_gpt(path, dropout=0.0).eval()
        if int8:
            if where.type != "cpu" or dtype not in ("auto", "float32"):
                raise ValueError("int8 weights work on the CPU, with dtype float32 or auto only")
            model = quantize_int8(model)
        else:
            model = model.to(where, _find_dtype(dtype, where))
        if where.type == "cpu":
            torch.set_num_threads(fastest_num_threads(model))
        return cls(model, registry, batch_size=batch_size)

    @overload
    def __call__(self, text: str) -> FunctionCall: ...
    @overload
    def __call__(self, text: list[str]) -> list[FunctionCall]: ...
    def __call__(self, text: str | list[str]) -> FunctionCall | list[FunctionCall]:
        """The call that a command asks for; for a list of commands, a list of calls.

        Raises:
            CommandError: a command is empty, or too long for the model.
            TypeError: neither a string nor a list of them.
        """
        responses = self.respond([text] if isinstance(text, str) else text)
        calls = [
            dataclasses.replace(parse_call(response.text), confidence=response.confidence)
            for response in responses
        ]
        return calls[0] if isinstance(text, str) else calls

    def respond(
        self,
        commands: Sequence[str],
        *,
        systems: Sequence[str] | None = None,
        constrained: bool = True,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[Response]:
        """The model's own text for each command, in order; unconstrained, it may be no call.

        Constrained, elements that the model repeats in an array are left out.

        `systems` are the system prompts, one for each command, as data files hold them; by
        default the one that all of this package's data has. `on_progress` is told how many more
        commands are answered, batch by batch.

        Raises:
            CommandError: a command is empty, or too long for the model.
        """
        if not isinstance(commands, Sequence) or not all(isinstance(c, str) for c in commands):
            raise TypeError(f"a command is a string, or a list of strings, not {commands!r:.60}")
        prompts = self._encode(commands, [SYSTEM] * len(commands) if systems is None else systems)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: dict[int, Response] = {}
        for start in range(0, len(prompts), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            generations = generate(
                self.model,
                [prompts[i] for i in batch],
                max_new_tokens=self._max_new_tokens,
                allow=[self._first_place(commands[i]) for i in batch] if constrained else None,
                prefix=self._prefix,
            )
            for i, generation in zip(batch, generations, strict=True):
                text = decode_response(generation.ids)
                if constrained and self._has_open_arrays:
                    text = _without_repeats(text)
                responses[i] = Response(text, math.exp(generation.log_probability))
            if on_progress is not None:
                on_progress(len(batch))
        return [responses[i] for i in range(len(prompts))]

    def _first_place(self, command: str) -> Allow:
        if self._has_verbatim:
            return _Copying(self._grammar, harmless(command), self.registry)
        return self._grammar

    def execute(self, text: str, handlers: Mapping[str, Callable[..., Any]]) -> Any:
        """Call the handler of the function that `text` asks for, with its arguments by keyword.

        Raises:
            IncompleteCall: a required argument was not said.
            UnknownHandler: `handlers` has no such function.
            CommandError: the command is empty, or too long for the model.
        """
        call = self(text)
        if not call.is_complete:
            raise IncompleteCall(call)
        if call.name not in handlers:
            raise UnknownHandler(
                f"{text!r:.60} asks for {call.name}, but handlers has only "
                f"{', '.join(handlers) or 'nothing'}; add {call.name}"
            )
        return handlers[call.name](**call.arguments)

    def _encode(self, commands: Sequence[str], systems: Sequence[str]) -> list[list[int]]:
        room = self.model.config.block_size - self._max_new_tokens
        prompts: list[list[int]] = []
        for number, (command, system) in enumerate(zip(commands, systems, strict=True)):
            which = number if len(commands) > 1 else None
            try:
                prompts.append(encode_command(command, system=system))
            except ValueError as error:
                raise CommandError(str(error), number=which) from None
            if (num_tokens := len(prompts[-1])) > room:
                problem = (
                    f"the command is too long: with the system prompt it takes {num_tokens:,} "
                    f"tokens, and the model has room for {room:,} besides the call; shorten "
                    f"{command!r:.60}"
                )
                raise CommandError(problem, number=which)
        return prompts


class _Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits, one scale for each output channel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        no_shift = torch.zeros_like(scales, dtype=torch.long)
        quantized = torch.quantize_per_channel(weight, scales, no_shift, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized, linear.bias)
        # Activations have 8 bits, but 7 on processors whose sums of products would overflow. That
        # bit halves how many calls come out otherwise than in float32.
        self._reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic(x, self._packed, self._reduce_range)


def quantize_int8(model: GPT) -> GPT:
    """The model with every matrix in int8, scaled by output channel; CPU only, in place.

    Activations are quantized on the fly, one scale for all that is fed at once. The embeddings
    stay as they are, and serve as the vocabulary head where only few of its rows are needed.
    """
    with warnings.catch_warnings():  # torch announces that torchao will replace this some day
        warnings.simplefilter("ignore")
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, _Int8Linear(child))
    return model


def _without_repeats(text: str) -> str:
    """A response with every array's elements once; where they are free, no grammar sees to it."""
    call = parse_call(text)
    once = {name: _once_each(value) for name, value in call.arguments.items()}
    return text if once == call.arguments else render_response(FunctionCall(call.name, once))


def _once_each(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    once: dict[Any, Any] = {}
    for element in value:
        once.setdefault(value_key(element), element)
    return list(once.values())


def _shared_prompt() -> list[int]:
    """The tokens with which every command's prompt begins."""
    pairs = zip(encode_command("a"), encode_command("?!"), strict=False)
    return [a for a, b in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _max_text_tokens(registry: Registry, block_size: int) -> int:
    """How many tokens a free string may take so that prompt and response fit into the model."""
    for most in range(MAX_TEXT_TOKENS, _MIN_TEXT_TOKENS - 1, -8):
        needed = _MIN_PROMPT_TOKENS + max_response_tokens(registry, max_text_tokens=most)
        if needed <= block_size:
            return most
    raise ValueError(
        f"the model's {block_size} positions are too few: a prompt and the longest call of "
        f"these functions need {needed}; train one with a larger block_size"
    )


@torch.inference_mode()
def fastest_num_threads(model: GPT) -> int:
    """Found by trying: beside a busy neighbour, or within a container's share of the cores, two
    threads can be six times slower than one."""
    ids, most = torch.tensor([_shared_prompt()[:16]]), torch.get_num_threads()

    def duration_s(num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        model.hidden_states(ids)  # the pool of threads starts
        start = time.perf_counter()
        for _ in range(3):
            model.hidden_states(ids)
        return time.perf_counter() - start

    return min((n for n in (1, 2, 4, 8) if n <= most), key=duration_s)


def _find_registry(checkpoint: str | Path, functions: str | Path | None) -> Registry:
    if functions is None and (source := load_registry_source(checkpoint)) is not None:
        return registry_from_source(source, checkpoint)
    return load_registry(functions)


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: there is no such device, or it can't be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used: {error}") from None


def _find_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {name!r}")
    return getattr(torch, name)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware itself computes in bf16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    is_x86_able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and is_x86_able
