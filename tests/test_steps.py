"""Each way of taking a step computes the same gradient, of batches that never end."""

from pathlib import Path

import pytest
import torch
from training import SHAPE, example

from fc_lightning.dataset import FunctionCallDataset, Row
from fc_lightning.module import FunctionCallModule
from fc_lightning.steps import endless_steps, warm_up

ROWS = [Row(example(i), Path("train.json"), i) for i in range(8)]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setattr("fc_lightning.steps.computes_in_bfloat16", lambda device: False)
    torch.manual_seed(0)
    return FunctionCallModule(**SHAPE, dropout=0.0)


def gradients(module, way):
    dataset = FunctionCallDataset(ROWS[:3], block_size=SHAPE["block_size"])
    step = next(endless_steps(way, module, dataset, batch_size=3, num_repeats=2))
    assert sorted(step.rows) == [0, 1, 2]
    module.zero_grad()
    step.add_gradients()
    return step.shape, {name: p.grad.clone() for name, p in module.named_parameters()}


def test_all_ways_compute_the_gradient_of_the_same_loss(module):
    shape, ours = gradients(module, "ours")
    for way, num_tokens in (("longest", None), ("reference", SHAPE["block_size"])):
        padded_shape, padded = gradients(module, way)
        assert padded_shape[1] == num_tokens or shape[1] < padded_shape[1] < SHAPE["block_size"]
        for name, gradient in ours.items():
            # fp32 sums in another order
            torch.testing.assert_close(padded[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_steps_go_on_forever_with_full_batches_of_each_row_once(module):
    dataset = FunctionCallDataset(ROWS, block_size=SHAPE["block_size"])
    for way in ("longest", "ours"):
        steps = endless_steps(way, module, dataset, batch_size=3)
        first, second = ([next(steps).rows for _ in range(2)] for _ in range(2))
        for epoch in (first, second):
            rows = [row for batch in epoch for row in batch]
            assert len(set(rows)) == 6
        assert first != second
    with pytest.raises(ValueError, match="8 rows are too few for a batch of 9"):
        endless_steps("ours", module, dataset, batch_size=9)


def test_a_warm_up_computes_each_shape_three_times(module):
    dataset = FunctionCallDataset(ROWS, block_size=192, pad_to_multiple_of=16)
    steps = list(zip(range(8), endless_steps("ours", module, dataset, batch_size=1), strict=False))
    computed = []
    counted = [step._replace(add_gradients=lambda s=step: computed.append(s)) for _, step in steps]
    warm_up(iter(counted), 8, torch.optim.SGD(module.parameters()))
    shapes = [step.shape for step in computed]
    assert 3 < len(shapes) < 24
    assert sorted(shapes) == sorted(3 * [*{step.shape for _, step in steps}])
