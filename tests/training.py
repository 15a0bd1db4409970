"""Tiny training runs for the tests, in this process or in one that can be killed.

    python tests/training.py ROOT DATA '{"max_epochs": 2, "ckpt_path": "last"}'

writes ROOT/log.jsonl (what was logged), ROOT/rows-RANK.jsonl (which rows each batch held) and,
when it comes to its end, ROOT/final.pt.
"""

import json
import logging
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from fc_lightning.calls import FunctionCall
from fc_lightning.chat import make_example
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.durability import AtomicCheckpointIO, SaveLast
from fc_lightning.module import FunctionCallModule

ZONES = ["driver", "front-passenger", "rear-right", "rear-left"]
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 192}


def example(i: int):
    """The i-th of many commands whose prompts and responses differ in length."""
    kind, degrees = i % 3, 15 + i % 15
    if kind == 0:
        area = ZONES[: 1 + i // 3 % 4]
        call = FunctionCall("set_temperature", {"temperature": degrees, "area": area})
        return make_example(f"{degrees} degrees for {' and '.join(area)}", call)
    if kind == 1:
        return make_example(f"play song {i}", FunctionCall("play_music", {"track": f"song {i}"}))
    words = " please" * (i // 3 % 5)
    return make_example(f"lock up{words}", FunctionCall("lock_doors", {"lock_state": "lock"}))


def write_rows(folder: Path, num_train: int, num_test: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (
        ("train", range(num_train)),
        ("test", range(1000, 1000 + num_test)),
    ):
        rows = [vars(example(i)) for i in numbers]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


class JsonLogger(Logger):
    name, version = "json", "0"

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass

    @rank_zero_only
    def log_metrics(self, metrics, step=None) -> None:
        with self.file.open("a") as file:
            line = {"step": step, **{name: float(value) for name, value in metrics.items()}}
            file.write(json.dumps(line) + "\n")


class WriteRows(L.Callback):
    """Notes which rows each training batch held."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        file = Path(trainer.default_root_dir) / f"rows-{trainer.global_rank}.jsonl"
        with file.open("a") as f:
            f.write(json.dumps([trainer.current_epoch, batch_idx, batch.rows]) + "\n")


def fit(
    root: Path,
    data: Path,
    *,
    ckpt_path=None,
    callbacks=(),
    save_every=2,
    batch_size=4,
    max_tokens=None,
    num_workers=0,
    seed=1,
    model=None,
    **options,
) -> L.Trainer:
    """Train a tiny model; `options` are the Trainer's, `model` those of FunctionCallModule."""
    _be_quiet()
    root.mkdir(parents=True, exist_ok=True)
    L.seed_everything(seed, verbose=False)
    settings = {"learning_rate": 3e-3, "warmup_iters": 2, "lr_decay_iters": None, "dropout": 0.2}
    module = FunctionCallModule(**SHAPE | settings | (model or {}))
    best = ModelCheckpoint(
        root / "checkpoints",
        filename="best",
        monitor="val/loss",
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    trainer = make_trainer(
        root, callbacks=[WriteRows(), best, SaveLast(save_every), *callbacks], **options
    )
    datamodule = FunctionCallDataModule(
        str(data), batch_size=batch_size, max_tokens=max_tokens, num_workers=num_workers
    )
    trainer.fit(module, datamodule, ckpt_path=ckpt_path)
    return trainer


def make_trainer(root: Path, **options) -> L.Trainer:
    _be_quiet()
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
        "logger": JsonLogger(root / "log.jsonl"),
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "default_root_dir": root,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [AtomicCheckpointIO()],
    }
    return L.Trainer(**defaults | options)


def final_state(trainer: L.Trainer) -> dict:
    return {
        "weights": {k: v.clone() for k, v in trainer.lightning_module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict(),
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "step": trainer.global_step,
    }


def is_same(a, b) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    return repr(a) == repr(b)


@contextmanager
def default_dtype(dtype: torch.dtype):
    """PyTorch's default dtype, which Lightning changes so for precision: bf16-true."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_lines(file: Path) -> list:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    trainer = fit(root, Path(sys.argv[2]), **json.loads(sys.argv[3]))
    if trainer.is_global_zero:
        torch.save(final_state(trainer), root / "final.pt")
