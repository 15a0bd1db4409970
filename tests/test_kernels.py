"""Triton's kernels compute what plain PyTorch does: by its interpreter here, compiled on a GPU."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from training import default_dtype

# Before 3.7, its interpreter doesn't go with NumPy 2.4.
oldest = None if torch.cuda.is_available() else "3.7"
pytest.importorskip("triton", oldest, reason="needs Triton, which is for Linux")
kernels = importlib.import_module("fc_lightning.kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, conftest.py asks to interpret


@pytest.mark.parametrize(
    ("C", "has_bias", "dtype"),
    [(24, True, torch.float32), (64, False, torch.float32), (24, True, torch.float16)],
)
def test_residual_and_norm_and_their_gradients_are_pytorchs(C, has_bias, dtype):
    torch.manual_seed(0)
    x, branch, d_total, d_normed = torch.randn(4, 70, C, device=DEVICE)
    branch, d_normed = branch.to(dtype), d_normed.to(dtype)  # as autocast computes them
    norm = torch.nn.LayerNorm(C, bias=has_bias, device=DEVICE)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    inputs = [x.requires_grad_(), branch.requires_grad_(), *norm.parameters()]
    total = x + branch
    plain = total, norm(total).to(dtype)
    ours = kernels.add_norm(x, branch, norm.weight, norm.bias)
    near = {"rtol": 1e-5, "atol": 2e-5}
    if dtype is torch.float16:
        near = {"rtol": 1e-3, "atol": 1e-3}  # 11 bits
    torch.testing.assert_close(ours, plain, **near)
    gradients = [torch.autograd.grad(y, inputs, (d_total, d_normed)) for y in (ours, plain)]
    torch.testing.assert_close(*gradients, **near)


def test_sums_are_in_fp32_whatever_the_default_dtype():
    torch.manual_seed(0)
    x, branch = torch.randn(2, 70, 24, device=DEVICE)
    weight = torch.randn(24, device=DEVICE, requires_grad=True)
    logits, targets = torch.randn(3, 50, device=DEVICE), torch.tensor([0, 7, 49], device=DEVICE)

    def computed():
        normed = kernels.add_norm(x, branch, weight, None)[1]
        losses = kernels.cross_entropy_gradient_(logits.clone(), targets)
        return normed, losses, *torch.autograd.grad(normed.square().sum(), weight)

    expected = computed()
    with default_dtype(torch.float16):
        torch.testing.assert_close(computed(), expected, rtol=0, atol=0)


def test_what_was_dropped_before_the_sum_has_no_gradient():
    torch.manual_seed(0)
    x, branch = torch.randn(2, 200, 64, device=DEVICE)
    weight = torch.ones(64, device=DEVICE)
    total, normed = kernels.add_norm(x, branch.requires_grad_(), weight, None, dropout=0.3)
    torch.testing.assert_close(normed, F.layer_norm(total, (64,)), rtol=1e-5, atol=1e-5)
    kept = (total - x) / branch
    is_kept = kept > 0.5
    torch.testing.assert_close(kept, is_kept / 0.7, rtol=1e-3, atol=1e-3)
    assert is_kept.float().mean().item() == pytest.approx(0.7, abs=0.02)  # 5 deviations
    assert not torch.equal(is_kept[0], is_kept[1])
    (gradient,) = torch.autograd.grad(total.sum(), branch)
    torch.testing.assert_close(gradient, is_kept / 0.7)
    other, _ = kernels.add_norm(x, branch, weight, None, dropout=0.3)
    assert not torch.equal(other, total)


def test_cross_entropy_and_its_gradient_are_pytorchs():
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 20_000, device=DEVICE)  # more than a block
    logits[4] += 500.0
    targets = torch.tensor([0, 19_999, 16_383, 16_384, 7], device=DEVICE)
    plain = logits.clone().requires_grad_()
    expected = F.cross_entropy(plain, targets, reduction="none")
    expected.sum().backward()
    losses = kernels.cross_entropy_gradient_(logits, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, plain.grad, rtol=1e-4, atol=1e-6)
