"""Packed attention is plain attention, and packed rows are padded ones, in a GPU's runs too.

By Triton's interpreter here, compiled on a GPU.
"""

import importlib
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from training import SHAPE, default_dtype, example, is_same, write_rows

from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.dataset import FunctionCallDataset, Row
from fc_lightning.module import FunctionCallModule

# Before 3.7, its interpreter doesn't go with NumPy 2.4.
oldest = None if torch.cuda.is_available() else "3.7"
pytest.importorskip("triton", oldest, reason="needs Triton, which is for Linux")
attention = importlib.import_module("fc_lightning.packed_attention")
kernels = importlib.import_module("fc_lightning.kernels")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, conftest.py asks to interpret
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what empty blocks divide
# Rows in one tile and across several; padding after the rows; a prefix or none; odd head sizes.
CASES = [
    (5, [7, 1, 12], 3, 2, 16),
    (40, [33, 64], 70, 1, 24),
    (32, [32, 31, 33], 0, 2, 16),
    (0, [3, 70], 30, 2, 16),
    (70, [65], 1, 1, 128),
    (20, [9, 150, 3, 130], 4, 1, 32),
]


def attend(qkv, P, lengths, H, dropout=0.0):
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    bounds = attention.row_bounds(starts, prefix_length=P, num_tokens=len(qkv) - P)
    return attention.packed_attention(qkv, bounds, num_heads=H, prefix_length=P, dropout=dropout)


def attend_plainly(qkv, P, lengths, H):
    """The same, from who sees whom."""
    row = torch.tensor([-1] * P + [i for i, n in enumerate(lengths) for _ in range(n)])
    is_visible = ((row == -1) | (row == row[:, None])).tril().to(qkv.device)
    query, key, value = qkv.view(len(qkv), 3, H, -1).permute(1, 2, 0, 3)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.size(2))
    y = scores.masked_fill(~is_visible, -torch.inf).softmax(-1) @ value
    return y.transpose(0, 1).flatten(1)


def tokens(P, lengths, padding, H, D):
    torch.manual_seed(0)
    N = P + sum(lengths) + padding
    d_y = torch.randn(N, H * D, device=DEVICE)
    d_y[N - padding :] = 0
    return torch.randn(N, 3 * H * D, device=DEVICE, requires_grad=True), d_y


@pytest.mark.parametrize(("P", "lengths", "padding", "H", "D"), CASES)
def test_attention_and_its_gradient_are_those_of_plain_attention(P, lengths, padding, H, D):
    qkv, d_y = tokens(P, lengths, padding, H, D)
    y = attend(qkv, P, lengths, H)
    (gradient,) = torch.autograd.grad(y, qkv, d_y)
    assert y.isfinite().all() and gradient.isfinite().all()  # of the padding too
    real = len(qkv) - padding
    plain = attend_plainly(qkv[:real], P, lengths, H)
    (plain_gradient,) = torch.autograd.grad(plain, qkv, d_y[:real])
    torch.testing.assert_close(y[:real], plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[:real], plain_gradient[:real], rtol=1e-5, atol=1e-5)


def gradient_of(qkv, d_y, P, lengths, H):
    return torch.autograd.grad(attend(qkv, P, lengths, H), qkv, d_y)[0]


@pytest.mark.parametrize("split", [16, 100])  # 20 programs, or 4
def test_many_programs_share_in_the_gradients_of_the_prefix(monkeypatch, split):
    P, lengths, padding, H, D = CASES[-1]
    qkv, d_y = tokens(P, lengths, padding, H, D)
    expected = gradient_of(qkv, d_y, P, lengths, H)  # by one
    monkeypatch.setattr(attention, "_SPLIT", split)
    gradient = gradient_of(qkv, d_y, P, lengths, H)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(gradient[:P], expected[:P])  # summed in another order
    assert torch.equal(gradient[P:], expected[P:])


def test_sums_are_in_fp32_whatever_the_default_dtype():
    P, lengths, padding, H, D = CASES[0]
    qkv, d_y = tokens(P, lengths, padding, H, D)
    expected = attend(qkv, P, lengths, H), gradient_of(qkv, d_y, P, lengths, H)
    with default_dtype(torch.float16):
        computed = attend(qkv, P, lengths, H), gradient_of(qkv, d_y, P, lengths, H)
    torch.testing.assert_close(computed, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("P", "lengths", "padding", "H", "D"), CASES[:2])
def test_the_backward_pass_drops_the_weights_that_the_forward_pass_dropped(
    P, lengths, padding, H, D
):
    qkv, d_y = tokens(P, lengths, padding, H, D)

    def dropped(qkv):
        torch.manual_seed(3)
        return attend(qkv, P, lengths, H, dropout=0.3)

    (gradient,) = torch.autograd.grad(dropped(qkv), qkv, d_y)
    assert not torch.equal(dropped(qkv), attend(qkv, P, lengths, H))
    step = 1e-2 * torch.randn_like(qkv)
    with torch.no_grad():
        change = ((dropped(qkv + step) - dropped(qkv - step)).double() * d_y).sum() / 2
    assert change.item() == pytest.approx((gradient.double() * step).sum().item(), rel=5e-3)


def test_a_share_of_the_weights_is_dropped_and_the_rest_makes_up_for_it():
    qkv = torch.randn(400, 3, 2, 16, device=DEVICE)
    qkv[:, 0] = 0.0  # all weights of a query are equal
    qkv[:, 2] = 1.0  # and their sum is what it sees
    torch.manual_seed(0)
    (y, head), (other, _) = (
        attend(qkv.flatten(1), 0, [200, 200], 2, dropout=0.3)[:, [0, 16]].unbind(1)
        for _ in range(2)
    )
    kept = y[[199, 399]] * 200 * 0.7  # of 200 weights
    assert ((kept - 140).abs() < 30).all()  # 4.6 standard deviations
    assert (kept - kept.round()).abs().max() < 1e-3
    assert y.mean().item() == pytest.approx(1.0, abs=0.05)
    for another in (other, head, y.roll(200)):  # by seed, head and row
        assert (y - another).abs().max() > 0.1


def test_without_dropout_the_random_state_stays():
    qkv, _ = tokens(5, [7], 0, 1, 16)
    before = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    attend(qkv, 5, [7], 1)
    after = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    assert torch.equal(before, after)


# ---------------------------------------------------------------- rows of a model


@pytest.mark.parametrize("has_prefix", [True, False])
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(has_prefix):
    torch.manual_seed(0)
    module = FunctionCallModule(**SHAPE, dropout=0.0).to(DEVICE)
    dataset = FunctionCallDataset(
        [Row(example(i), Path("train.json"), i) for i in range(5)], block_size=192
    )
    if not has_prefix:
        dataset.prefix_length = 0
    results = []
    for batch_of in (dataset.__getitem__, dataset.packed):
        module.zero_grad()
        loss = module.loss_sum(batch_of([3, 0, 1, 4, 2]).to(torch.device(DEVICE)))
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in module.parameters())])
    for padded, packed in zip(*results, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_training", [True, False])
def test_packed_rows_are_dropped_wherever_gpt2_has_it_and_in_training_alone(
    monkeypatch, is_training
):
    module = FunctionCallModule(**SHAPE, dropout=0.3).to(DEVICE).train(is_training)
    dropped = {"embedding": [], "branch": [], "weights": []}

    def spy_on(home, name, what):
        plain = getattr(home, name)

        def spied(*args, **options):
            dropped[what].append(options.get("dropout", args[-1]))
            return plain(*args, **options)

        monkeypatch.setattr(home, name, spied)

    spy_on(kernels, "add_norm", "branch")
    spy_on(attention, "packed_attention", "weights")
    module.gpt.transformer.drop.register_forward_hook(
        lambda drop, *_: dropped["embedding"].append(drop.p if drop.training else 0.0)
    )
    rows = [3, 0, 1]
    dataset = FunctionCallDataset(
        [Row(example(i), Path("train.json"), i) for i in range(5)], block_size=192
    )
    loss = module.loss_sum(dataset.packed(rows).to(torch.device(DEVICE)))
    p = 0.3 if is_training else 0.0
    num_layers = SHAPE["n_layer"]
    # The first norm of all has nothing yet to add, the last is the network's own.
    assert dropped == {
        "embedding": [p],
        "branch": [p] * (2 * num_layers + 1),
        "weights": [p] * num_layers,
    }
    padded = module.eval().loss_sum(dataset[rows].to(torch.device(DEVICE))).item()
    assert (loss.item() == pytest.approx(padded, rel=1e-5)) is not is_training


# ---------------------------------------------------------------- CUDA graphs


class Record(L.Callback):
    def __init__(self, save_at=None):
        self.losses, self.shapes, self.save_at = [], set(), save_at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert batch.starts is not None
        self.shapes.add(tuple(batch.ids.shape))
        self.losses.append(float(trainer.callback_metrics.get("train/loss", 0)))
        if batch_idx + 1 == self.save_at:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")


def fit(root, data, *, accumulate=1, validate_every=4, compile=True, dropout=0.2, **options):
    """What was logged, and the weights, after two epochs of nine batches, the last one small."""
    L.seed_everything(1, verbose=False)
    record = Record(options.pop("save_at", None))
    module = FunctionCallModule(
        **SHAPE,
        dropout=dropout,
        compile=compile,
        learning_rate=3e-3,
        warmup_iters=2,
        lr_decay_iters=12,
    )
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        val_check_interval=validate_every,
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
    )
    rows = FunctionCallDataModule(str(data), batch_size=12)
    trainer.fit(module, rows, ckpt_path=options.pop("ckpt_path", None))
    return record, {name: w.cpu() for name, w in module.state_dict().items()}


@on_gpu
@pytest.mark.parametrize(("accumulate", "validate_every"), [(1, 4), (3, 4), (3, 3)])
def test_graphed_steps_are_those_of_a_plain_run(tmp_path, monkeypatch, accumulate, validate_every):
    data = write_rows(tmp_path / "data", 100, 6)
    both = {"accumulate": accumulate, "validate_every": validate_every, "dropout": 0.0}
    plain, _ = fit(tmp_path, data, compile=False, **both)
    replayed, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(graph), replay(graph))
    )
    graphed, _ = fit(tmp_path, data, **both)
    assert len(replayed) >= 20  # two blocks there and back, in five steps at least
    assert len(graphed.shapes) >= 2
    assert graphed.losses == pytest.approx(plain.losses, rel=2e-3)
    assert graphed.losses[-1] < graphed.losses[2] - 0.3


@on_gpu
@pytest.mark.parametrize(("accumulate", "save_at"), [(1, 5), (3, 5)])  # in mid-window
def test_a_graphed_run_repeats_and_resumes_bit_for_bit(tmp_path, accumulate, save_at):
    data = write_rows(tmp_path / "data", 100, 6)
    _, whole = fit(tmp_path, data, accumulate=accumulate, save_at=save_at)
    _, again = fit(tmp_path, data, accumulate=accumulate)
    assert is_same(whole, again)
    _, resumed = fit(tmp_path, data, accumulate=accumulate, ckpt_path=tmp_path / "half.ckpt")
    assert is_same(whole, resumed)
