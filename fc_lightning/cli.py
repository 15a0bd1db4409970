"""`fit`, `validate`, `test` and `predict` through LightningCLI.

Defaults, the callbacks that can be configured, errors in words, and what is said when a run ends.
The commands that need no Trainer are in commands.py.
"""

from __future__ import annotations

import difflib
import json
import logging
import shlex
import warnings
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fc_lightning.callbacks import (
    ProgressBar,
    SampleCalls,
    Throughput,
    ValidateCalls,
    ValidateLastStep,
)
from fc_lightning.caller import computes_in_bfloat16
from fc_lightning.checkpoint import load_plain
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.durability import SaveLast
from fc_lightning.failures import ExplainFailures, is_out_of_memory
from fc_lightning.module import FunctionCallModule
from fc_lightning.ranks import gather
from fc_lightning.textdata import TextDataModule

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
SUBCOMMANDS = ("fit", "validate", "test", "predict")


class FunctionCallCLI(LightningCLI):
    """Trains, validates and tests a `FunctionCallModule` on calls, or on text if that is given.

    Two data modules without a class_path in configs: `data.text_files` is what only
    `TextDataModule` has, so a config or option with it says enough, and every key of either keeps
    its short name, its place in --help and its own error message.
    """

    def __init__(self, args: list[str]) -> None:
        is_text = any(key.startswith("data.text_files") for key, _ in _said_keys(args))
        super().__init__(
            FunctionCallModule,
            TextDataModule if is_text else FunctionCallDataModule,
            args=args,
            trainer_defaults={
                "precision": _best_precision(),
                "gradient_clip_val": 1.0,
                "use_distributed_sampler": False,  # the data module shares rows out exactly
                "default_root_dir": "outputs",
                "log_every_n_steps": 10,
                "enable_model_summary": False,  # _SayStart says what a user asks
                "callbacks": [_SayStart(), ExplainFailures(), ValidateLastStep()],
                "plugins": [{"class_path": "fc_lightning.durability.AtomicCheckpointIO"}],
            },
            seed_everything_default=1337,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=_Parser,
            parser_kwargs={"prog": "python -m fc_lightning"},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best",
                "checkpoint.save_on_train_epoch_end": False,  # after each validation instead
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(SaveLast, "last")
        parser.add_lightning_class_args(SampleCalls, "samples")
        parser.add_lightning_class_args(ValidateCalls, "calls")
        parser.add_lightning_class_args(Throughput, "throughput")

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(*args, **kwargs)
        if "verbose" in parser.get_defaults():
            parser.set_defaults({"verbose": False})  # our table says it, in the order of interest
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        _reject_unknown_keys(args, self._subcommand_parsers)
        self._said = {key for key, _ in _said_keys(args)}
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Train as the checkpoint was trained, but for what the command line and configs say.

        Lightning would put a checkpoint's hyperparameters over those of the command line.
        """
        config = self.config[self.config.subcommand]
        root = Path(config.trainer.default_root_dir or ".")
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(root / "checkpoints")
        last = Path(config.checkpoint.dirpath) / "last.ckpt"
        file = last if config.ckpt_path == "last" else Path(config.ckpt_path or "")
        if file.is_file():
            _take_hyperparameters(config.model, load_plain(file), self._said, file)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        data_dir = config.data.get("fc_data_dir")
        if data_dir is not None and not Path(data_dir).is_dir():
            raise ValueError(f"data.fc_data_dir {data_dir}: no such folder")
        callbacks = config.trainer.callbacks or []
        has_bar = any("ProgressBar" in callback.class_path for callback in callbacks)
        if config.trainer.enable_progress_bar is not False and not has_bar:
            self.trainer_defaults["callbacks"].append(ProgressBar())

    def after_fit(self) -> None:
        """Score the best checkpoint on validation rows, and say where everything is."""
        checkpoint = self.trainer.checkpoint_callback
        best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        if not best or self.trainer.fast_dev_run:
            return
        self.trainer.validate(self.model, self.datamodule, ckpt_path=best, verbose=False)
        if self.trainer.is_global_zero:
            self._say_result(best)

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            Console().print(_measures_table(self.trainer.callback_metrics, "val"))

    def after_test(self) -> None:
        if self.trainer.is_global_zero:
            Console().print(_measures_table(self.trainer.callback_metrics, "test"))

    def after_predict(self) -> None:
        """Write what was predicted on all ranks to one file, and say where it is."""
        batches = gather(self.trainer.predict_loop.predictions)
        if self.trainer.is_global_zero:
            lines = [line for of_rank in batches for batch in of_rank for line in batch]
            lines.sort(key=lambda line: (line["file"], line["row"]))
            file = Path(self.trainer.default_root_dir) / "predictions.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.write_text(text, encoding="utf-8")
            print(f"{len(lines):,} predictions are in {file}")

    def _say_result(self, best: str) -> None:
        console = Console()
        console.print(_measures_table(self.trainer.callback_metrics, "val"))
        calls = next(c for c in self.trainer.callbacks if isinstance(c, ValidateCalls))
        wrong = [p for p in calls.predictions if not p.is_match][:3]
        right = [p for p in calls.predictions if p.is_match]
        shown = [*right[:: max(1, len(right) // 3)][:3], *wrong]
        for p in shown:
            mark = "[green]ok[/]" if p.is_match else "[red]x [/]"
            console.print(f"{mark} [bold]{escape(p.command)}[/]", highlight=False)
            console.print(f"   {p.shown}", style="dim", markup=False, highlight=False)
            if not p.is_match:
                console.print(f"   should be {p.expected}", markup=False, style="dim")
        checkpoint, root = _from_here(best), _from_here(self.trainer.default_root_dir)
        lines = [f"best checkpoint  {checkpoint}", f"TensorBoard      tensorboard --logdir {root}"]
        if (root / "samples").is_dir():
            lines.append(f"samples          {root / 'samples' / 'val_sample.txt'}")
        command = f"python -m fc_lightning {{}} {checkpoint}"
        if shown:
            words = _quoted(shown[0].command)
            lines.append(f"try it           {command.format('call --checkpoint')} {words}")
        elif isinstance(self.datamodule, TextDataModule):
            lines.append(f"fine-tune it     {command.format('fit --model.pretrained_dir')}")
        console.print("", *lines, sep="\n", markup=False, highlight=False, soft_wrap=True)


class _SayStart(L.Callback):
    """Says what is about to be trained, on what, and for how long."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        num_steps = trainer.estimated_stepping_batches  # all ranks find it out together
        if trainer.is_global_zero:
            source = trainer.ckpt_path or pl_module.hparams["pretrained_dir"] or "random weights"
            data, num_devices = trainer.datamodule, trainer.world_size
            device = pl_module.device.type + (f" x {num_devices}" if num_devices > 1 else "")
            print(
                f"{pl_module.gpt.num_parameters() / 1e6:.1f} M parameters, from {source}\n"
                f"{len(data.train_set):,} rows for training, {len(data.val_set):,} for validation\n"
                f"{num_steps:,} steps on {device}, {trainer.precision}"
            )


def _quoted(words: str) -> str:
    """Words for a shell, in the quotes that people type wherever these will do."""
    return shlex.quote(words) if set(words) & set('"$`\\!') else f'"{words}"'


def _from_here(path: str) -> Path:
    """A path as short as it can be said in this folder."""
    here, there = Path.cwd(), Path(path).absolute()
    return there.relative_to(here) if there.is_relative_to(here) else there


def main(args: list[str]) -> None:
    """Run one of SUBCOMMANDS.

    Raises:
        ValueError: an option, config or input that can't be used, in words.
    """
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")  # Lightning's own
    # Right: batches are collated in 0.1 ms, so workers would only take the cores from training.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # An advertisement.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "litlogger" not in record.getMessage())
    try:
        FunctionCallCLI(args)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError("\n".join(getattr(error, "__notes__", [str(error)]))) from error


def _best_precision() -> str:
    """bf16 where the hardware computes in it, else fp16 with scaling on a GPU and fp32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if computes_in_bfloat16(device):
        return "bf16-mixed"
    return "16-mixed" if device.type == "cuda" else "32-true"


def _measures_table(metrics: dict[str, Any], stage: str) -> Table:
    table = Table(stage, "", box=SIMPLE_HEAD, pad_edge=False)
    names = [
        "loss",
        "num_examples",
        "call_match",
        "function_match",
        "argument_match",
        "argument_f1",
        "valid",
        "complete_call_match",
        "incomplete_call_match",
        "incomplete_f1",
    ]
    for name in names:
        if (value := metrics.get(f"{stage}/{name}")) is not None:
            shown = f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"
            table.add_row(name, f"{value:.0f}" if name == "num_examples" else shown)
    return table


def _take_hyperparameters(
    model: Namespace, checkpoint: Mapping[str, Any], said: set[str], file: Path
) -> None:
    """Put a checkpoint's hyperparameters where the user has said nothing.

    Raises:
        ValueError: a shape was said that the checkpoint's model hasn't.
    """
    if "gpt_config" not in checkpoint:
        return  # of another program, which the module refuses
    shape = {name: checkpoint["gpt_config"][name] for name in SHAPE}
    if model.pretrained_dir is None:
        for name in SHAPE:
            if f"model.{name}" in said and model[name] not in (None, shape[name]):
                raise ValueError(
                    f"model.{name} {model[name]} is not that of {file}, {shape[name]}; leave it "
                    "out, or start a new model without ckpt_path"
                )
    model.pretrained_dir = None  # what it gave is in the checkpoint
    for name, value in {**checkpoint["hyper_parameters"], **shape}.items():
        if name in model and (name in SHAPE or f"model.{name}" not in said):
            model[name] = value


# ---------------------------------------------------------------- config errors in words


class _Parser(LightningArgumentParser):
    """A parser whose errors are one line and an exception, not fifty lines of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
        raise ValueError(" ".join(lines)[:600]) from ex


def _reject_unknown_keys(args: list[str], parsers: Mapping[str, LightningArgumentParser]) -> None:
    """Say which key of which file, or which option, doesn't exist, and what is nearest to it.

    Raises:
        ValueError: the first such key or option.
    """
    parser = parsers.get(args[0]) if args else None
    if parser is None:
        return
    known = {option[2:] for option in parser._option_string_actions if option.startswith("--")}
    for key, file in _said_keys(args):
        if _is_known(key, known):
            continue
        if file is None:
            raise ValueError(f"no option --{key}{_nearest(key, known, '--')}")
        raise ValueError(f"config {file}: no key {key!r}{_nearest(key, known)}")


def _said_keys(args: list[str]) -> Iterator[tuple[str, Path | None]]:
    """Every key that the options and their config files set, and the file if it is one's.

    Raises:
        ValueError: a config file that can't be read.
    """
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        option, _, value = arg.partition("=")
        if option in ("--config", "-c"):
            file = Path(value or following)
            yield from ((key, file) for key in _keys(_read_config(file)))
        elif option.startswith("--"):
            yield option[2:], None


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config {file}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"config {file}: must be a mapping such as 'model:' and 'trainer:'")
    return content


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and "class_path" not in value:
            yield from _keys(value, f"{prefix}{key}.")


def _is_known(key: str, known: set[str]) -> bool:
    """Whether an option is `key`, lies below it (model), or takes it in (trainer.logger.name)."""
    parents = {key.rsplit(".", n)[0] for n in range(1, key.count(".") + 1)}
    open_parents = parents & {
        "trainer.logger", "trainer.callbacks", "trainer.plugins", "data.text_files"
    }  # fmt: skip
    return key.rstrip("+") in known or bool(open_parents) or key in {k.split(".")[0] for k in known}


def _nearest(key: str, known: set[str], prefix: str = "") -> str:
    by_name = {k.rsplit(".", 1)[-1]: k for k in sorted(known)}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    near = near or [
        by_name[n]
        for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_name, n=1, cutoff=0.7)
    ]
    return f"; the nearest is {prefix}{near[0]}" if near else "; --help lists them"
