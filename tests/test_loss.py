"""The chunked loss is plain cross-entropy, in value and in gradients."""

import pytest
import torch
import torch.nn.functional as F

from fc_lightning import loss
from fc_lightning.loss import head_cross_entropy_sum

N, C, V = 21, 8, 50


def case(dtype=torch.float32, num_states=N):
    torch.manual_seed(0)
    states = torch.randn(num_states, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    return states, weight, torch.randint(V, (num_states,))


def plain(states, weight, targets):
    return F.cross_entropy(F.linear(states, weight).float(), targets, reduction="sum")


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("num_states", [1, 16, 17, 1023, 1025, 2100])  # chunks are 1,024 and 16
def test_value_and_gradients_are_those_of_cross_entropy(num_states):
    states, weight, targets = case(num_states=num_states)
    ours = head_cross_entropy_sum(states, weight, targets)
    gradients = torch.autograd.grad(3 * ours, (states, weight))
    expected = plain(states, weight, targets)
    expected_gradients = torch.autograd.grad(3 * expected, (states, weight))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == wanted.dtype and error(gradient, wanted) < 1e-6


def test_under_autocast_it_is_as_near_as_bf16_is():
    states, weight, targets = case()
    exact = plain(states, weight, targets)
    wanted = torch.autograd.grad(exact, (states, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ours = head_cross_entropy_sum(states, weight, targets)
    gradients = torch.autograd.grad(ours, (states, weight))
    assert ours.item() == pytest.approx(exact.item(), rel=1e-2)  # bf16 has 8 bits: 2^-8 = 0.004
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert 0 < error(gradient, expected) < 1e-2


def test_no_trained_token_has_no_loss_and_no_gradient():
    states, weight, targets = case(num_states=0)
    ours = head_cross_entropy_sum(states, weight, targets)
    ours.backward()
    assert ours.item() == 0.0
    assert (weight.grad == 0).all()


def test_huge_logits_do_not_overflow():
    states, weight, targets = case()
    ours = head_cross_entropy_sum(states * 1000, weight, targets)
    assert ours.item() == pytest.approx(plain(states * 1000, weight, targets).item(), rel=1e-6)


def test_without_gradients_none_are_computed(monkeypatch):
    states, weight, targets = case()
    monkeypatch.setattr(loss, "_add_product", lambda *args: pytest.fail("computed a gradient"))
    with torch.no_grad():
        ours = head_cross_entropy_sum(states, weight, targets)
    assert ours.item() == pytest.approx(plain(states, weight, targets).item(), rel=1e-6)
