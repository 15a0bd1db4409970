"""The LightningModule: a GPT, its masked loss, its optimizer and learning rate schedule.

Gradients are exact: a step over several micro-batches and ranks has the gradient of one batch
with all their rows, averaged over trained tokens. Data, sampling and metrics live elsewhere.

Shapes: see dataset.Batch. B rows, T tokens a row, C width, V vocabulary, N trained tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fc_lightning.checkpoint import CheckpointError, load_gpt
from fc_lightning.dataset import Batch
from fc_lightning.gpt import GPT, Block, GPTConfig
from fc_lightning.loss import head_cross_entropy_sum
from fc_lightning.optimizers import MuonAdamW, check_training, param_groups
from fc_lightning.predictions import as_plain, predict_rows
from fc_lightning.ranks import gather, sum_over_ranks
from fc_lightning.tokenizer import NUM_TOKENS


class FunctionCallModule(L.LightningModule):
    """Trains a GPT on whatever a `Batch` holds: (command, call) rows, or windows of text.

    >>> module = FunctionCallModule(n_layer=1, n_head=1, n_embd=8, block_size=256)
    >>> trainer = lightning.Trainer(max_epochs=1)  # doctest: +SKIP
    >>> trainer.fit(module, FunctionCallDataModule("my_data"))  # doctest: +SKIP

    Args:
        pretrained_dir: "base" or "vehicle" for those that ship, a nanoGPT ckpt.pt or its folder, a
            Hugging Face GPT-2 folder, or a Lightning .ckpt. Without one, a new model of the shape
            below.
        n_layer: blocks of a new model; a pretrained one keeps its own shape.
        n_head: attention heads of a block of a new model.
        n_embd: width of a new model, all heads together.
        block_size: positions, prompt and response together; crops a pretrained model to so
            many. Without one 256, or the pretrained model's own.
        learning_rate: its peak, after the warmup.
        min_lr: the learning rate at the end.
        warmup_iters: optimizer steps of linear warmup.
        lr_decay_iters: optimizer step at which min_lr is reached; null (None) for the whole run.
        lr_schedule: after the warmup a "cosine", or a "trapezoid": half of it flat, then linear.
        weight_decay: on matrices and embeddings, as nanoGPT has it; none on biases and norms.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        optimizer: "adamw" for all weights, or "muon" for the matrices of the blocks, which needs
            far fewer steps, from random weights and from the base.
        muon_lr: Muon's peak learning rate; it follows the same schedule.
        dropout: probability, wherever GPT-2 has it.
        compile: run the training network through torch.compile (a minute, once; needs a C++
            compiler, or Triton on a GPU, where it is launched as CUDA graphs). Evaluation stays
            as it is. Where rows are not packed, `data.pad_to_multiple_of` 16 keeps lengths few.

    Raises:
        CheckpointError: pretrained_dir can't be read, or is no GPT-2.
        ValueError: a shape, rate or schedule that can't be used.
    """

    hparams: Any  # Lightning types it as a mapping without attributes
    _window_loss: Tensor
    _num_window_tokens: int
    _evaluated: list[tuple[Tensor, int]]  # summed loss and trained tokens, by batch

    def __init__(
        self,
        pretrained_dir: str | None = None,
        learning_rate: float = 5e-6,
        min_lr: float = 1e-6,
        warmup_iters: int = 2000,
        lr_decay_iters: int | None = 54000,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.95,
        dropout: float = 0.2,
        compile: bool = False,
        lr_schedule: Literal["cosine", "trapezoid"] = "cosine",
        optimizer: Literal["adamw", "muon"] = "adamw",
        muon_lr: float = 0.02,
        n_layer: int = 8,
        n_head: int = 8,
        n_embd: int = 256,
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # callbacks.log_hyperparameters logs them
        check_training(self.hparams)
        if pretrained_dir is not None:
            self.gpt = load_gpt(pretrained_dir, dropout=dropout, block_size=block_size)
        else:
            shape = GPTConfig(
                block_size=256 if block_size is None else block_size,
                n_layer=n_layer,
                n_head=n_head,
                n_embd=n_embd,
                dropout=dropout,
                bias=False,
            )
            self.gpt = GPT(shape)
        if self.gpt.config.vocab_size < NUM_TOKENS:
            raise ValueError(
                f"the checkpoint has {self.gpt.config.vocab_size} vocabulary rows; function calls "
                f"need ids up to {NUM_TOKENS - 1}"
            )
        self._resume_from: Mapping[str, Any] | None = None
        self._are_gradients_kept = False
        self._start_window()

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if type(strategy)._setup_model is DDPStrategy._setup_model:
            wrap = functools.partial(_wrap_for_ddp, strategy)
            strategy._setup_model = wrap  # type: ignore[method-assign]

    @property
    def block_size(self) -> int:
        """Positions of the model: the longest row it can read."""
        return self.gpt.config.block_size

    @property
    def can_pack(self) -> bool:
        """Whether batches of packed rows can be read, now and where the model is."""
        return self.gpt.can_pack

    # ---------------------------------------------------------------- loss

    def loss_sum(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the trained tokens of a batch, in nats, ().

        Compiled and on a GPU, its gradients must be computed, used and dropped before it is called
        again, unless they were added to gradients already there (`optimizer_zero_grad`).

        Raises:
            ValueError: a packed row has more tokens than the model has positions.
        """
        run: Callable[..., Any] = _as_it_is
        if self.training and self.hparams.compile:
            is_graphed = self.device.type == "cuda"
            run = functools.partial(_compiled, is_graphed=is_graphed)
            if is_graphed:
                torch.compiler.cudagraph_mark_step_begin()
        if batch.starts is not None:
            if (longest := len(batch.prefix) + max(batch.lengths)) > self.block_size:
                raise ValueError(
                    f"a row of {longest} tokens, but the model has {self.block_size} positions"
                )
            hidden = self.gpt.hidden_states_packed(
                batch.prefix, batch.ids, batch.starts, run_block=run(Block.forward_packed)
            )  # (R, C)
        elif batch.prefix.numel():
            hidden = self.gpt.hidden_states_after(
                batch.prefix, batch.ids, run_block=run(Block.forward_shared)
            )  # (B, T, C)
        else:
            hidden = self.gpt.hidden_states(batch.ids, run_block=run(Block.forward))
        trained = hidden.flatten(0, -2).index_select(0, batch.trained_at)  # (N, C)
        return head_cross_entropy_sum(trained, self.gpt.lm_head.weight, batch.targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._start_window()  # as Lightning drops gradients: a resumed window may be cut short
        loss_sum = self.loss_sum(batch)
        self._window_loss = self._window_loss + loss_sum.detach()
        self._num_window_tokens += len(batch.targets)
        # Lightning divides by accumulate_grad_batches; on_before_optimizer_step, by tokens.
        return loss_sum * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into the mean over all trained tokens of window and ranks."""
        num_tokens = torch.full_like(self._window_loss, self._num_window_tokens)
        sums = torch.stack([self._window_loss, num_tokens])
        loss, num_tokens = sum_over_ranks(sums)
        # DDP has averaged the sums over ranks: undo that, then divide by the tokens of all.
        scale = self.trainer.world_size / num_tokens
        torch._foreach_mul_([p.grad for p in self.parameters() if p.grad is not None], scale)
        self.log("train/loss", loss / num_tokens)  # callbacks.ProgressBar shows it
        logged = {
            "train/learning_rate": optimizer.param_groups[-1]["lr"],  # AdamW's, with Muon too
            # The step that this becomes; without it Lightning adds a chart of epochs.
            "step": float(self.trainer.global_step + 1),
        }
        for name, value in logged.items():
            # Filled in on the device; Lightning would copy it there, which waits for a GPU.
            self.log(name, torch.full((), value, device=self.device))
        self._start_window()

    def optimizer_zero_grad(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Drop the gradients, or where several batches add to them, keep their memory.

        Memory that a CUDA graph computed a gradient in lasts until the next forward pass.
        """
        are_kept = self.trainer.accumulate_grad_batches > 1
        optimizer.zero_grad(set_to_none=not (are_kept and self._are_gradients_kept))
        if are_kept:
            for parameter in self.parameters():
                if parameter.requires_grad and parameter.grad is None:  # after a validation, too
                    parameter.grad = torch.zeros_like(parameter)
        self._are_gradients_kept = are_kept

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer was told to, with a fused optimizer too.

        Lightning's mixed precision refuses to clip for a fused optimizer, because that would
        unscale fp16 gradients after the clipping. In bf16 nothing is scaled, and in fp16 the
        optimizer here is not fused.
        """
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def _start_window(self) -> None:
        self._window_loss = torch.zeros((), device=self.device)
        self._num_window_tokens = 0

    def on_train_start(self) -> None:
        self._start_window()
        self._set_optimizer_as_asked()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._resume_from is not None:
            self._restore_run(self._resume_from)
            self._resume_from = None

    def on_validation_epoch_start(self) -> None:
        self._evaluated = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val/loss")

    def on_test_epoch_start(self) -> None:
        self._evaluated = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test/loss")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """The calls that the model makes of a batch's commands (see `predictions.as_plain`)."""
        dataset = self.trainer.datamodule.val_set
        # Plain, since Lightning takes what is returned apart and refuses a frozen dataclass.
        return [as_plain(p, dataset) for p in predict_rows(self, dataset, batch.rows)]

    def _evaluate(self, batch: Batch) -> None:
        if batch.rows:  # a rank may have none of the last batch
            self._evaluated.append((self.loss_sum(batch), len(batch.targets)))

    def _log_evaluation(self, name: str) -> None:
        """Log the mean loss of a trained token over the batches of all ranks."""
        loss = sum(loss.item() for loss, _ in self._evaluated)
        sums = torch.tensor([loss, sum(n for _, n in self._evaluated)], dtype=torch.float64)
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        # All ranks know it by now; sync_dist only keeps Lightning from warning that they may not.
        self.log(name, (sums[0] / sums[1]).float(), prog_bar=True, sync_dist=True)
        self.log("step", float(self.trainer.global_step), sync_dist=True)

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes a checkpoint complete: the model's shape, the domain, the exact moment."""
        checkpoint["hyper_parameters"]["pretrained_dir"] = None  # a checkpoint stands alone
        checkpoint["gpt_config"] = dataclasses.asdict(self.gpt.config)
        registry = getattr(getattr(self.trainer, "datamodule", None), "registry", None)
        if registry is not None:
            checkpoint["registry"] = json.loads(json.dumps(registry.source, default=str))
        checkpoint["ranks"] = gather(self._run_state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's shape; learning rate and the like stay as they were asked for."""
        if "gpt_config" not in checkpoint:
            raise CheckpointError(
                "this .ckpt was not written by fc_lightning; to start from other weights, set "
                "model.pretrained_dir"
            )
        shape = GPTConfig(**checkpoint["gpt_config"] | {"dropout": self.hparams.dropout})
        if shape != self.gpt.config:
            self.gpt = GPT(shape)
        ranks = checkpoint.get("ranks", [])
        self._resume_from = ranks[self.global_rank] if self.global_rank < len(ranks) else None
        is_to_train = self._trainer is not None and self.trainer.state.fn == "fit"
        states = checkpoint.get("optimizer_states", []) if is_to_train else []
        for state in states:
            if len(state["param_groups"]) != len(self._param_groups()):
                raise CheckpointError(
                    f"this .ckpt was not trained with model.optimizer {self.hparams.optimizer!r}; "
                    "resume with its own, or start anew with model.pretrained_dir"
                )

    def _run_state(self) -> dict[str, Any]:
        """What this rank alone knows: random states, and an accumulation window half done."""
        if self._resume_from is not None:
            return dict(self._resume_from)  # nothing was trained since
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        if self._num_window_tokens:
            state["window_tokens"] = self._num_window_tokens
            # On the host: a GPU may have no room for the gradients of all ranks.
            state["window_loss"] = self._window_loss.cpu()
            state["gradients"] = [p.grad.cpu() for p in self.parameters()]
        return state

    def _restore_run(self, state: Mapping[str, Any]) -> None:
        torch.set_rng_state(state["torch"].cpu())
        random.setstate(state["python"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)
        if "gradients" in state:
            self._num_window_tokens = state["window_tokens"]
            self._window_loss = state["window_loss"].to(self.device)
            for parameter, gradient in zip(self.parameters(), state["gradients"], strict=True):
                parameter.grad = gradient.to(self.device)

    # ---------------------------------------------------------------- optimizer

    def _param_groups(self) -> list[dict[str, Any]]:
        p = self.hparams
        return param_groups(
            self.gpt,
            learning_rate=p.learning_rate,
            betas=(p.beta1, p.beta2),
            weight_decay=p.weight_decay,
            muon_lr=p.muon_lr if p.optimizer == "muon" else None,
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer_class = MuonAdamW if self.hparams.optimizer == "muon" else torch.optim.AdamW
        # A fused AdamW unscales fp16 gradients itself, after they were averaged and clipped.
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        optimizer = optimizer_class(self._param_groups(), fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _set_optimizer_as_asked(self) -> None:
        """Put this run's settings over those that came back with a checkpoint's optimizer."""
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0]
        factor = self._learning_rate_factor(scheduler.scheduler.last_epoch)
        groups = self._param_groups()
        for group, asked in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: value for name, value in asked.items() if name != "params"})
            group.update(initial_lr=asked["lr"], lr=asked["lr"] * factor)
        scheduler.scheduler.base_lrs = [asked["lr"] for asked in groups]

    def _learning_rate_factor(self, step: int) -> float:
        """Learning rate at an optimizer step, as a share of the peak (nanoGPT's get_lr).

        The same share for all groups, so that Muon's rate follows AdamW's.
        """
        p = self.hparams
        # Step 0 always ends here: a scheduler is made before a checkpoint's loops are restored, and
        # to ask for the run's length then would make Lightning forget where its loader stood.
        if step <= p.warmup_iters:
            return (step + 1) / (p.warmup_iters + 1)
        last = p.lr_decay_iters or self._num_steps()
        floor = p.min_lr / p.learning_rate
        if step >= last:
            return floor
        progress = (step - p.warmup_iters) / max(1, last - p.warmup_iters)
        if p.lr_schedule == "trapezoid":
            return floor + (1 - floor) * min(1.0, 2 - 2 * progress)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def _num_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ValueError: it has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("a run without end: set model.lr_decay_iters or trainer.max_steps")
        return int(steps)


def _wrap_for_ddp(strategy: DDPStrategy, model: torch.nn.Module) -> DistributedDataParallel:
    """Wrap as Lightning does, but on the stream of the forward pass, not on one of its own.

    DDP adds gradients up on the stream it was made on. On another one that comes too late: a CUDA
    graph's gradients lie where the next graph writes (two ranks that accumulate: off by 5e-3).
    """
    devices = strategy.determine_ddp_device_ids()
    return DistributedDataParallel(model, device_ids=devices, **strategy._ddp_kwargs)


@functools.cache
def _compiled(run_block: Callable[..., Any], is_graphed: bool) -> Callable[..., Any]:
    """Compiled for each shape it meets: one block in seconds, where the whole network takes half a
    minute. Shapes are static: with dynamic ones torch 2.11 fails in the backward pass of
    PyTorch's LayerNorm.

    Graphed, each block's kernels are launched at once, by a CUDA graph: with few rows, a GPU
    computes them sooner than a host launches them one by one."""
    torch._dynamo.config.optimize_ddp = False  # would cut a block up, and compile each part
    for limit in ("recompile_limit", "accumulated_recompile_limit"):  # beyond, torch raises
        setattr(torch._dynamo.config, limit, max(4096, getattr(torch._dynamo.config, limit)))
    mode = "reduce-overhead" if is_graphed else None
    return torch.compile(run_block, dynamic=False, fullgraph=True, mode=mode)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
