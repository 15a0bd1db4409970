"""The benchmark commands: one function each, whose signature is its command line.

As in commands.py, whatever takes long to import is imported by the command that needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fc_lightning.functions import load_registry

Shape = Literal["tiny", "20M", "gpt2", "gpt2-medium"]


def benchmark_decode(
    *,
    shape: Shape | None = None,
    device: str = "auto",
    num_commands: int | None = None,
    seconds: float = 10.0,
) -> None:
    """Measure how fast models answer, beside transformers' generate and decoding without a cache.

    Args:
        shape: size of the models, whose weights are random; without it, 20M and gpt2
        device: cpu, cuda, ...; auto takes a GPU if there is one
        num_commands: how many at once when many are asked; without it, 2048 on a GPU, else 32
        seconds: no measurement is repeated once it has taken so long
    """
    from fc_lightning.benchmark import benchmark_decode as measure

    shapes = (shape,) if shape else ("20M", "gpt2")
    measure(shapes, device=device, num_commands=num_commands, seconds=seconds)


def benchmark_train(
    *,
    data: Path | None = None,
    shape: Shape = "20M",
    device: str = "auto",
    batch_size: int | None = None,
    dropout: float = 0.2,
    seconds: float = 10.0,
) -> None:
    """Measure how fast models train, beside a loop that pads every row.

    Args:
        data: folder of example files; without one, 5,000 are synthesized
        shape: size of the model, whose weights are random
        device: cpu, cuda, ...; auto takes a GPU if there is one
        batch_size: rows a step; without it, 64 on a GPU, else 32
        dropout: probability, wherever GPT-2 has it
        seconds: how long each way is measured
    """
    from fc_lightning.benchmark_train import benchmark_train as measure
    from fc_lightning.dataset import Row, read_rows
    from fc_lightning.synthesis import synthesize

    if data is None:
        examples = synthesize(load_registry(), num_examples=5_000).train
        rows = [Row(example, Path("synthesized"), n) for n, example in enumerate(examples)]
    else:
        rows = read_rows(data, "train")
    measure(
        rows,
        shape=shape,
        device=device,
        batch_size=batch_size,
        dropout=dropout,
        seconds=seconds,
    )


def benchmark_quality(
    data: Path,
    *,
    pretrained_dir: str | None = None,
    shape: Shape = "20M",
    functions: Path | None = None,
    device: str = "auto",
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    muon_lr: float = 0.02,
    num_steps: int = 1000,
    limit_s: float = 120.0,
    loss: float = 0.02,
    match: float = 0.9,
) -> None:
    """Measure how long training takes to a validation loss and to a share of calls that match.

    By the tutorial's recipe and by this package's, from the same weights, on the same rows. The
    tutorial's steps are taken our way, which has the same gradients (but for dropout, drawn once a
    step and not eight times), and count as long as its own.
    For a GPU, where it takes minutes; two CPU cores need most of an hour for 19 M parameters, with
    `--batch_size 32 --limit_s 900`, since they take four minutes for a step of the tutorial's.

    Args:
        data: folder of example files
        pretrained_dir: weights to start from, as `fit` takes them
        shape: without those, size of a model whose weights are random
        functions: the domain's YAML file; without one, the vehicle's eighteen functions
        device: cpu, cuda, ...; auto takes a GPU if there is one
        batch_size: rows a step
        learning_rate: our recipe's peak learning rate, for embeddings and norms
        muon_lr: its peak for the matrices of the blocks; 0.003 if the start is a tuned model
        num_steps: steps over which both decay
        limit_s: seconds of computing after which a recipe is given up
        loss: nats a trained token, over the test files
        match: share of the test files' calls, between 0 and 1
    """
    from fc_lightning.benchmark_quality import benchmark_quality as measure

    measure(
        data,
        pretrained_dir=pretrained_dir,
        shape=shape,
        functions=None if functions is None else str(functions),
        device=device,
        batch_size=batch_size,
        learning_rate=learning_rate,
        muon_lr=muon_lr,
        num_steps=num_steps,
        limit_s=limit_s,
        loss=loss,
        match=match,
    )
