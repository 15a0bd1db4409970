"""The commands that need no Trainer: one function each, whose signature is its command line.

What a command does is done elsewhere; here options are read and results are shown. Whatever takes
long to import is imported by the command that needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fc_lightning.benchmark_cli import benchmark_decode, benchmark_quality, benchmark_train
from fc_lightning.calls import INCOMPLETE_PREFIX, FunctionCall, parse_call
from fc_lightning.command_line import nearest, run
from fc_lightning.functions import Registry, load_registry

if TYPE_CHECKING:
    from fc_lightning.caller import FunctionCaller
    from fc_lightning.dataset import Row

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

# ---------------------------------------------------------------- data


def synthesize(
    output: Path,
    *,
    num_examples: int = 25_000,
    seed: int = 0,
    functions: Path | None = None,
    incomplete_share: float = 0.125,
) -> None:
    """Write examples for training and test, made from the sentences of a domain file.

    Args:
        output: new folder for fc_train.json and fc_test.json
        num_examples: how many different commands, a tenth of them for test
        seed: the same seed writes the same files
        functions: the domain's YAML file; without one, the vehicle's eighteen functions
        incomplete_share: share of requests that leave a required argument out
    """
    from fc_lightning.synthesis import write_data_folder

    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: exists and is not empty; name a new folder")
    registry = load_registry(functions)
    examples = write_data_folder(
        output,
        registry,
        num_examples=num_examples,
        seed=seed,
        incomplete_share=incomplete_share,
    )
    calls = [parse_call(example.assistant) for example in examples.train]
    console = Console()
    console.print(_coverage_table(registry, calls))
    for name, rows in (("fc_train.json", examples.train), ("fc_test.json", examples.test)):
        _say(f"{output / name}: {len(rows):,} examples")
    if missing := num_examples - len(examples.train) - len(examples.test):
        _say(f"{missing:,} fewer than asked: few sentences are kept for test, and all are said")


def _coverage_table(registry: Registry, calls: Sequence[FunctionCall]) -> Table:
    """Training examples by function, and the arguments of which some value never occurs."""
    from fc_lightning.coverage import never_said

    counts = Counter(call.name for call in calls)
    unsaid: dict[str, list[str]] = {}
    for (name, argument), values in never_said(registry, calls).items():
        if counts[name]:
            function = name.removeprefix(INCOMPLETE_PREFIX)
            where = "" if name == function else ", incomplete"
            unsaid.setdefault(function, []).append(f"{len(values)} of {argument}{where}")
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("training examples", no_wrap=True)
    table.add_column("complete", justify="right")
    table.add_column("incomplete", justify="right")
    table.add_column("values that never occur" if unsaid else "")
    for name in registry.by_name:
        cells = [
            Text(f"{counts[n]:,}", "" if counts[n] else "red") if n in registry.call_names else ""
            for n in (name, INCOMPLETE_PREFIX + name)
        ]
        table.add_row(name, *cells, Text("; ".join(unsaid.get(name, [])), "red"))
    return table


def doctor(
    data: Path, *, functions: Path | None = None, block_size: int = 1024, all: bool = False
) -> None:
    """Say all that is wrong with a folder of example files; exits with 1 if anything is.

    Args:
        data: folder of example files
        functions: the domain's YAML file; without one, the vehicle's eighteen functions
        block_size: positions of the model that will be trained
        all: list every place, one a line, instead of the first few
    """
    from fc_lightning.doctor import diagnose

    diagnosis = diagnose(data, load_registry(functions), block_size=block_size)
    if all:
        for kind, where, what in diagnosis.problems:
            _say(f"{where}: {kind}: {what}")
    else:
        Console().print(diagnosis)
    if diagnosis.problems:
        sys.exit(1)


def inspect(
    data: Path,
    row: int,
    *,
    split: Literal["train", "test"] = "train",
    functions: Path | None = None,
) -> None:
    """Show one example as the model sees it: token by token, with ids, trained ones in green.

    Args:
        data: an example file, or a folder of them
        row: its number, counted from 0 as errors count it; in a folder, through all files
        split: which files of a folder
        functions: the domain's YAML file; without one, the vehicle's eighteen functions
    """
    from fc_lightning.chat import encode_example, render_response
    from fc_lightning.dataset import DataError, expected_call
    from fc_lightning.inspection import TokenView

    registry, found = load_registry(functions), _find_row(data, split, row)
    example, console = found.example, Console(highlight=False)
    _say(f"{found.where}\n{example.command!r}")
    try:
        call = expected_call(found, registry)
    except DataError as error:
        console.print(Text(str(error), "red"))
    else:
        _say(str(call))
        for problem in registry.violations(call):
            console.print(Text(f"against its schema: {problem}", "red"))
        # In training, too, calls are read in canonical order.
        example = dataclasses.replace(example, assistant=render_response(call))
    console.print(TokenView(encode_example(example)))


def _find_row(path: Path, split: str, number: int) -> Row:
    """The row with this number, whatever is wrong with the others."""
    from fc_lightning.dataset import Row, find_files, read_entries, read_example

    before = 0
    for file in [path] if path.is_file() else find_files(path, split):
        entries = read_entries(file)
        if 0 <= (n := number - before) < len(entries):
            return Row(read_example(entries[n], f"{file}: row {n}"), file, n)
        before += len(entries)
    raise ValueError(f"{path}: no row {number}; the last is row {before - 1}")


# ---------------------------------------------------------------- a model in use


def call(
    text: list[str],
    *,
    checkpoint: str = "vehicle",
    functions: Path | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    int8: bool = False,
    unconstrained: bool = False,
) -> None:
    """Turn commands into function calls, written as JSON, one a line.

    Without TEXT, commands are read from stdin, one a line; on a terminal, they are asked for. A
    command that can't be answered gives {"error": ...}, and the exit code is 1.

    Args:
        text: commands, each in quotes
        checkpoint: a Lightning .ckpt, a nanoGPT ckpt.pt, a folder with a Hugging Face GPT-2, or
            vehicle, the tuned model that ships
        functions: the domain's YAML file; without one, that in the checkpoint, else the vehicle's
        device: cpu, cuda, ...; auto takes a GPU if there is one
        dtype: auto takes bfloat16 where the hardware computes in it
        int8: 8-bit weights, the fastest on a CPU
        unconstrained: let the model write what it likes, which may be no call
    """
    from fc_lightning.caller import FunctionCaller

    caller = FunctionCaller.from_checkpoint(
        checkpoint, functions=functions, device=device, dtype=dtype, int8=int8
    )
    if not text:
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if sys.stdin.isatty():
            return _converse(caller, constrained=not unconstrained)
    if not _answer_all(caller, text or sys.stdin, constrained=not unconstrained):
        sys.exit(1)


def _answer_all(caller: FunctionCaller, commands: Iterable[str], *, constrained: bool) -> bool:
    """Print a JSON line for each command as soon as it is known; whether all were answered."""
    is_ok = True
    for command in commands:
        try:
            shown = _as_json(_answer(caller, command.rstrip("\r\n"), constrained=constrained))
        except ValueError as error:
            is_ok, shown = False, {"error": str(error)}
        print(json.dumps(shown, ensure_ascii=False), flush=True)
    return is_ok


def _as_json(call: FunctionCall) -> dict[str, Any]:
    return {
        "name": call.name,
        "arguments": dict(call.arguments),
        "is_complete": call.is_complete,
        "missing": list(call.missing),
        "confidence": round(call.confidence or 0.0, 4),
    }


def _answer(caller: FunctionCaller, command: str, *, constrained: bool) -> FunctionCall:
    if constrained:
        return caller(command)
    [response] = caller.respond([command], constrained=False)
    return dataclasses.replace(parse_call(response.text), confidence=response.confidence)


def _converse(caller: FunctionCaller, *, constrained: bool) -> None:
    """Ask for commands until the end of input, and show the call of each."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives input() a history)
    console = Console(highlight=False)
    console.print(f"{len(caller.registry.functions)} functions. Say what you want; Ctrl-D ends.")
    while True:
        try:
            command = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        start = time.perf_counter()
        try:
            found = _answer(caller, command, constrained=constrained)
        except ValueError as error:
            console.print(Text(str(error), "red"))
            continue
        duration_ms = 1e3 * (time.perf_counter() - start)
        console.print(Text(str(found), "bold"))
        if found.missing:
            console.print(Text(f"ask for: {', '.join(found.missing)}", "yellow"))
        console.print(Text(f"confidence {found.confidence:.1%}, {duration_ms:.0f} ms", "dim"))


def evaluate(
    data: Path,
    output: Path,
    *,
    checkpoint: str = "vehicle",
    functions: Path | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    int8: bool = False,
    batch_size: int | None = None,
) -> None:
    """Score a model on examples, with and without constrained decoding.

    Args:
        data: an example file, or a folder, of which the test files are taken
        output: folder for report.html, report.json and the predictions
        checkpoint: a Lightning .ckpt, a nanoGPT ckpt.pt, a folder with a Hugging Face GPT-2, or
            vehicle, the tuned model that ships
        functions: the domain's YAML file; without one, that in the checkpoint, else the vehicle's
        device: cpu, cuda, ...; auto takes a GPU if there is one
        dtype: auto computes as `call` does; float32 gives the same figures on every machine
        int8: 8-bit weights, the fastest on a CPU
        batch_size: commands decoded at once; without it, 512 on a GPU, else 64
    """
    from fc_lightning.dataset import read_rows

    rows = read_rows(data, "test")

    from fc_lightning.caller import FunctionCaller
    from fc_lightning.evaluation import evaluate as score

    caller = FunctionCaller.from_checkpoint(
        checkpoint,
        functions=functions,
        device=device,
        dtype=dtype,
        int8=int8,
        batch_size=batch_size,
    )
    Console().print(score(caller, rows, output))
    for name in ("report.html", "report.json", "predictions.jsonl"):
        _say(str(output / name))


def export(
    checkpoint: Path, format: Literal["nanogpt", "hf", "base-bf16", "base-int8"], output: Path
) -> None:
    """Write a checkpoint for nanoGPT, or for transformers' GPT2LMHeadModel.

    Args:
        checkpoint: a Lightning .ckpt, a nanoGPT ckpt.pt, or a folder with a Hugging Face GPT-2
        format: nanogpt writes a ckpt.pt, hf a folder with config.json and model.safetensors;
            base-bf16 and base-int8 one small .safetensors file to start training from
        output: where to write; must not exist yet
    """
    from fc_lightning.export import export as write

    with warnings.catch_warnings(record=True) as caught:
        written = write(checkpoint, format=format, output=output)
    for warning in caught:
        print(f"fc_lightning export: {warning.message}", file=sys.stderr)
    _say(str(written))


# ---------------------------------------------------------------- the command line

COMMANDS: dict[str, Callable[..., None]] = {
    "synthesize": synthesize,
    "doctor": doctor,
    "inspect": inspect,
    "call": call,
    "evaluate": evaluate,
    "export": export,
    "benchmark train": benchmark_train,
    "benchmark quality": benchmark_quality,
    "benchmark decode": benchmark_decode,
}
_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: list[str]) -> None:
    """Run one of COMMANDS with its options.

    Raises:
        ValueError: an unknown command or option, or an input that can't be used, in words.
    """
    num_words = 2 if args[0] == "benchmark" else 1
    name, options = " ".join(args[:num_words]), args[num_words:]
    if name not in COMMANDS:
        if longer := [n for n in COMMANDS if n.startswith(f"{args[0]} ")]:
            raise ValueError(f"say what to measure: {', '.join(longer)}")
        near = nearest(name, [*COMMANDS, *_TRAINER_COMMANDS])
        raise ValueError(f"no such command{near or '; python -m fc_lightning --help lists them'}")
    run(name, COMMANDS[name], options)


def _say(line: str) -> None:
    """Print a line as it is, however long, so that paths can be copied."""
    print(line.encode(errors="backslashreplace").decode())
