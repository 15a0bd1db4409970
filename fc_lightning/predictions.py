"""What a model in training makes of rows of its data: greedy, unconstrained, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch

from fc_lightning.calls import FunctionCall, calls_equal, parse_call
from fc_lightning.chat import Example, decode_response, encode_command
from fc_lightning.dataset import FunctionCallDataset
from fc_lightning.decoding import Generation, generate
from fc_lightning.metrics import read_call


class Prediction(NamedTuple):
    """A command, the call it should be, and what the model made of it."""

    row: int  # of the dataset
    command: str
    expected: FunctionCall
    text: str
    predicted: FunctionCall | None
    confidence: float  # the probability of `text` to the model

    @property
    def is_match(self) -> bool:
        return self.predicted is not None and calls_equal(self.expected, self.predicted)

    @property
    def shown(self) -> str:
        """The predicted call, or the start of what can't be read as one, on one line."""
        if self.predicted is not None:
            return str(self.predicted)
        return f"unreadable: {' '.join(self.text.split())[:200]!r}"


def predict_rows(
    module: L.LightningModule, dataset: FunctionCallDataset, rows: Sequence[int]
) -> list[Prediction]:
    """Greedy predictions for `rows` of a dataset, by this rank alone."""
    examples = [dataset.rows[row].example for row in rows]
    if not examples:
        return []
    prompts = [encode_command(example.command, system=example.system) for example in examples]
    # A model that never ends its response is cut soon after the longest one that is right.
    longest = int((dataset.lengths - dataset.prompt_lengths).max()) + 8
    max_new_tokens = min(longest, module.block_size - max(map(len, prompts)))
    with _evaluating(module):
        generations = generate(module.gpt, prompts, max_new_tokens=max_new_tokens)
    return [
        _prediction(row, example, generation)
        for row, example, generation in zip(rows, examples, generations, strict=True)
    ]


def _prediction(row: int, example: Example, generation: Generation) -> Prediction:
    expected, text = parse_call(example.assistant), decode_response(generation.ids)
    confidence = math.exp(generation.log_probability)
    return Prediction(row, example.command, expected, text, read_call(text), confidence)


def as_plain(prediction: Prediction, dataset: FunctionCallDataset) -> dict[str, Any]:
    """A prediction and where its row stands, as what JSON knows."""
    row = dataset.rows[prediction.row]
    expected, predicted = prediction.expected, prediction.predicted
    return {
        "file": str(row.file),
        "row": row.number,
        "command": prediction.command,
        "call": predicted and {"name": predicted.name, "arguments": dict(predicted.arguments)},
        "expected": {"name": expected.name, "arguments": dict(expected.arguments)},
        "is_match": prediction.is_match,
        "text": prediction.text,
        "confidence": prediction.confidence,
    }


@contextmanager
def _evaluating(module: L.LightningModule) -> Iterator[None]:
    """The module without dropout and gradients, in the Trainer's precision."""
    was_training = module.training
    module.eval()
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        yield
    module.train(was_training)
