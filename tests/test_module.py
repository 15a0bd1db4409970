"""What a step learns: exact gradients and losses, the schedule, and who sets the optimizer."""

import functools
import math
import traceback
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from training import SHAPE, example, fit, make_trainer, read_lines, write_rows

from fc_lightning.callbacks import ProgressBar, SampleCalls, Throughput
from fc_lightning.checkpoint import CheckpointError
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.dataset import FunctionCallDataset, Row
from fc_lightning.durability import SaveLast
from fc_lightning.failures import ExplainFailures
from fc_lightning.functions import VEHICLE
from fc_lightning.loader import LengthBatchSampler
from fc_lightning.module import FunctionCallModule, _compiled


def make_module(**settings) -> FunctionCallModule:
    torch.manual_seed(0)
    return FunctionCallModule(**{**SHAPE, "dropout": 0.0, "lr_decay_iters": 100} | settings)


class Recorder(FunctionCallModule):
    """Writes down the rows of each step and the gradients that the optimizer gets."""

    def on_train_start(self):
        super().on_train_start()
        self.rows, self.steps = [], []

    def training_step(self, batch, batch_idx):
        self.rows += batch.rows
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *args, **kwargs):
        gradients = {name: p.grad.clone() for name, p in self.gpt.named_parameters()}
        self.steps.append((self.rows, gradients))
        self.rows = []

    def on_train_end(self):
        folder = self.trainer.default_root_dir
        torch.save(self.steps, f"{folder}/steps-{self.global_rank}.pt")


def one_big_batch(gpt, dataset, rows):
    """Mean loss of a trained token and its gradients, in double precision, row by row."""
    gpt.zero_grad()
    losses = []
    for row in rows:
        ids = torch.from_numpy(dataset.row_ids(row).astype("int64"))
        first = dataset.prompt_lengths[row] - 1
        logits = gpt(ids[None, :-1])[0, first:]
        losses.append(F.cross_entropy(logits, ids[first + 1 :], reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in gpt.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("limit", "size"), [("batch_size", 4), ("max_tokens", 300)])
def test_a_window_has_the_gradient_and_the_loss_of_one_big_batch(
    tmp_path, accumulate, ranks, limit, size
):
    data = write_rows(tmp_path / "data", 13, 2)
    torch.manual_seed(0)
    # A rate so small that the weights stay what they were.
    module = Recorder(**SHAPE, dropout=0.0, learning_rate=1e-30, min_lr=0.0, lr_decay_iters=100)
    trainer = make_trainer(
        tmp_path,
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        accumulate_grad_batches=accumulate,
        max_epochs=1,
        enable_checkpointing=False,
    )
    # 4 batches of 4, 4, 4 and 1 rows, or on 2 ranks of 2 and 2, ..., 2 and 1, 1 and 1
    datamodule = FunctionCallDataModule(str(data), **{"batch_size": None, limit: size // ranks})
    trainer.fit(module, datamodule)
    steps = [torch.load(tmp_path / f"steps-{rank}.pt") for rank in range(ranks)]
    logged = [
        line["train/loss"] for line in read_lines(tmp_path / "log.jsonl") if "train/loss" in line
    ]
    datamodule.setup("fit")
    num_batches = len(LengthBatchSampler(datamodule.train_set.padded_lengths, **{limit: size}))
    assert num_batches >= 4
    assert len(logged) == len(steps[0]) == math.ceil(num_batches / accumulate)
    all_rows = [row for of_rank in steps for rows, _ in of_rank for row in rows]
    assert sorted(all_rows) == list(range(13))
    gpt = module.gpt.double()
    for step, loss in enumerate(logged):
        rows = [row for of_rank in steps for row in of_rank[step][0]]
        big_loss, big_gradients = one_big_batch(gpt, datamodule.train_set, rows)
        assert loss == pytest.approx(big_loss, rel=1e-6)
        for of_rank in steps:
            for name, gradient in of_rank[step][1].items():
                error = (gradient - big_gradients[name]).norm() / big_gradients[name].norm()
                assert error < 1e-6, (name, error)


@pytest.fixture
def compiler(monkeypatch):
    """Counts what torch.compile is given, and generates no code: that takes a C++ compiler."""
    compiler = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    _compiled.cache_clear()
    yield compiler
    _compiled.cache_clear()


def test_blocks_are_compiled_once_a_shape_and_never_again(tmp_path, compiler):
    shapes, at_epoch_ends = set(), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            shapes.add(tuple(batch.ids.shape))

        def on_train_epoch_end(self, *_):
            at_epoch_ends.append(compiler.frame_count)

    data = write_rows(tmp_path / "data", 22, 3)
    datamodule = FunctionCallDataModule(str(data), batch_size=4, pad_to_multiple_of=16)
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[Watch()], enable_checkpointing=False)
    trainer.fit(make_module(compile=True, dropout=0.2), datamodule)  # validates in between
    assert 3 <= len(shapes) <= 5  # few lengths, and a smaller last batch
    assert at_epoch_ends == [len(shapes)] * 3  # one block is compiled for all of them


def test_a_compiled_step_has_the_gradient_of_one_that_is_not(compiler):
    rows = [Row(example(i), "train.json", i) for i in range(6)]
    batch = FunctionCallDataset(rows, block_size=192, pad_to_multiple_of=16)[list(range(6))]
    plain, compiled = make_module(), make_module(compile=True)
    for module in (plain, compiled):
        module.loss_sum(batch).backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5, msg=name)
    assert compiler.frame_count == 1


def test_rows_have_one_loss_with_and_without_the_shared_prefix():
    rows = [Row(example(i), "train.json", i) for i in range(6)]
    module = make_module().double()
    dataset = FunctionCallDataset(rows, block_size=192)
    assert dataset.prefix_length > 40
    with_prefix = module.loss_sum(dataset[list(range(6))])
    dataset.prefix_length = 0
    without = module.loss_sum(dataset[list(range(6))])
    assert with_prefix.item() == pytest.approx(without.item(), rel=1e-12)


def test_a_packed_row_longer_than_the_model_is_refused():
    rows = [Row(example(0), "train.json", 0)]
    batch = FunctionCallDataset(rows, block_size=192).packed([0])
    module = FunctionCallModule(n_layer=1, n_head=1, n_embd=8, block_size=64)
    with pytest.raises(ValueError, match=r"a row of 1\d\d tokens, but the model has 64 positions"):
        module.loss_sum(batch)


class Syncs(TorchDispatchMode):
    """Notes who asks for the value of a tensor, which on a GPU waits for all work before it."""

    def __init__(self):
        super().__init__()
        self.askers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            files = [frame.filename for frame in traceback.extract_stack()]
            # On a CPU, AdamW asks for the number of its step; the one for GPUs doesn't.
            if not any("torch/optim/adam" in file for file in files):
                self.askers.append(files)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_no_value_is_fetched_from_the_device_between_logs(tmp_path, capsys, accumulate):
    data = write_rows(tmp_path / "data", 24, 2)
    trainer = make_trainer(
        tmp_path,
        max_epochs=1,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
        log_every_n_steps=100,
        enable_progress_bar=True,
        callbacks=[SaveLast(), ExplainFailures(), Throughput(), SampleCalls(), ProgressBar()],
    )
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_):
            seen.append(len(syncs.askers))

    trainer.callbacks.append(Watch())
    with Syncs() as syncs:
        trainer.fit(make_module(), FunctionCallDataModule(str(data), batch_size=3))
    assert len(seen) == 8
    assert syncs.askers[seen[0] : seen[-1]] == []
    loss = float(trainer.callback_metrics["train/loss"])
    assert f"train/loss={loss:.3g}" in capsys.readouterr().out


def test_validation_loss_is_the_mean_over_all_trained_tokens(tmp_path):
    data = write_rows(tmp_path / "data", 4, 7)
    module = make_module()
    datamodule = FunctionCallDataModule(str(data), batch_size=3)
    trainer = make_trainer(tmp_path)
    logged = trainer.validate(module, datamodule, verbose=False)[0]["val/loss"]
    tested = trainer.test(module, datamodule, verbose=False)[0]["test/loss"]
    expected, _ = one_big_batch(module.gpt.double(), datamodule.val_set, range(7))
    assert logged == tested == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- the learning rate


def get_lr(it, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """As nanoGPT's train.py has it."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@pytest.mark.parametrize("warmup_iters", [0, 1, 7])
def test_the_schedule_is_nanogpts(warmup_iters):
    settings = {
        "learning_rate": 6e-4,
        "min_lr": 6e-5,
        "warmup_iters": warmup_iters,
        "lr_decay_iters": 20,
    }
    module = make_module(**settings)
    for it in range(25):
        rate = 6e-4 * module._learning_rate_factor(it)
        assert rate == pytest.approx(get_lr(it, **settings), rel=1e-12)


def test_a_trapezoid_is_flat_for_half_the_way_and_then_straight():
    settings = {"learning_rate": 1.0, "min_lr": 0.0, "warmup_iters": 0, "lr_decay_iters": 8}
    module = make_module(lr_schedule="trapezoid", **settings)
    rates = [module._learning_rate_factor(it) for it in range(10)]
    assert rates == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_without_lr_decay_iters_the_last_step_is_the_end_of_the_schedule(tmp_path):
    data = write_rows(tmp_path / "data", 12, 2)
    model = {"warmup_iters": 1, "lr_decay_iters": None, "learning_rate": 1e-3, "min_lr": 0.0}
    trainer = fit(tmp_path, data, max_epochs=2, accumulate_grad_batches=2, model=model)
    assert trainer.global_step == 4  # 3 batches an epoch: windows of 2 and 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


def test_a_run_without_end_needs_an_end_of_its_schedule(tmp_path):
    data = write_rows(tmp_path / "data", 4, 2)
    with pytest.raises(ValueError, match=r"set model\.lr_decay_iters or trainer\.max_steps"):
        fit(tmp_path, data, max_epochs=-1, model={"warmup_iters": 0, "lr_decay_iters": None})


def test_only_matrices_and_embeddings_are_decayed(tmp_path):
    module = make_module(weight_decay=0.1)
    module.trainer = make_trainer(tmp_path)
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in others["params"]} == {1}
    assert sum(map(len, (decayed["params"], others["params"]))) == len(
        list(module.gpt.parameters())
    )


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_stands_alone_with_shape_domain_and_plain_values(tmp_path):
    data = write_rows(tmp_path / "data", 4, 2)
    fit(tmp_path, data, max_epochs=1)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["gpt_config"]["n_embd"] == SHAPE["n_embd"]
    assert len(content["registry"]["functions"]) == 18
    assert content["hyper_parameters"]["pretrained_dir"] is None
    loaded = FunctionCallModule.load_from_checkpoint(
        tmp_path / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert torch.equal(loaded.gpt.lm_head.weight, content["state_dict"]["gpt.lm_head.weight"])


def test_a_checkpoints_shape_is_taken(tmp_path):
    data = write_rows(tmp_path / "data", 4, 2)
    fit(tmp_path, data, max_epochs=1)
    other = FunctionCallModule(n_layer=1, n_head=1, n_embd=8, block_size=192)
    trainer = make_trainer(tmp_path)
    file = tmp_path / "checkpoints" / "best.ckpt"
    trainer.validate(other, FunctionCallDataModule(str(data)), ckpt_path=file, verbose=False)
    assert other.gpt.config.n_embd == SHAPE["n_embd"]


def test_another_programs_checkpoint_and_another_optimizers_are_refused(tmp_path):
    data = write_rows(tmp_path / "data", 4, 2)
    with pytest.raises(CheckpointError, match="not written by fc_lightning"):
        make_module().on_load_checkpoint({"state_dict": {}})
    fit(tmp_path, data, max_epochs=1)
    with pytest.raises(CheckpointError, match=r"not trained with model\.optimizer 'muon'"):
        fit(tmp_path, data, max_epochs=2, ckpt_path="last", model={"optimizer": "muon"})
    other = make_module(optimizer="muon")
    file = tmp_path / "checkpoints" / "best.ckpt"
    make_trainer(tmp_path).validate(  # where no optimizer is needed
        other, FunctionCallDataModule(str(data)), ckpt_path=file, verbose=False
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_schedule": "linear"}, "lr_schedule must be cosine or trapezoid, not 'linear'"),
        ({"optimizer": "sgd"}, "optimizer must be adamw or muon, not 'sgd'"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, not 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, not nan"),
        ({"optimizer": "muon", "muon_lr": -1.0}, "muon_lr must be above 0, not -1.0"),
        ({"min_lr": 1.0}, "min_lr must be from 0 to learning_rate 5e-06, not 1.0"),
        ({"warmup_iters": -5}, "warmup_iters must be at least 0, not -5"),
        ({"lr_decay_iters": 0}, "lr_decay_iters must be at least 1, not 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, not -0.1"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), not 1.0"),
        ({"block_size": 0}, "block_size must be at least 1, not 0"),
    ],
)
def test_hyperparameters_that_cannot_be_trained_with_are_refused(settings, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        make_module(**settings)


def test_the_smart_home_is_learned_from_its_file_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FC_LIGHTNING_CACHE", str(tmp_path))
    home = str(VEHICLE.with_name("smart_home.yaml"))
    datamodule = FunctionCallDataModule(functions=home, num_examples=400, batch_size=6)
    L.seed_everything(0, verbose=False)
    schedule = {"learning_rate": 2e-2, "warmup_iters": 5, "lr_decay_iters": None}
    module = FunctionCallModule(**SHAPE | schedule | {"n_embd": 32, "block_size": 256})
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    (before,) = trainer.validate(module, datamodule, verbose=False)
    trainer.fit(module, datamodule)
    (after,) = trainer.validate(module, datamodule, verbose=False)
    assert before["val/loss"] > 10  # nats: ln(50,304) is 10.8
    assert after["val/loss"] < 4  # on sentences of templates that training never saw


def test_only_gradients_in_memory_of_their_own_are_added_to():
    """A CUDA graph's lie in memory that the next forward pass takes."""
    module = FunctionCallModule(**SHAPE)
    optimizer = torch.optim.SGD(module.parameters())
    weight = module.gpt.lm_head.weight

    def zero(num_batches):
        module.trainer = SimpleNamespace(accumulate_grad_batches=num_batches)
        module.optimizer_zero_grad(0, 0, optimizer)

    weight.grad = torch.ones_like(weight)
    zero(1)
    assert weight.grad is None
    weight.grad = of_graph = torch.ones_like(weight)
    zero(2)
    kept = weight.grad
    assert kept is not of_graph and not kept.any()
    kept += 1
    zero(2)
    assert weight.grad is kept and not kept.any()
    module.on_validation_model_zero_grad()  # Lightning's, after a window
    zero(2)
    assert weight.grad is not None and not weight.grad.any()
