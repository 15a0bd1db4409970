"""Fine-tune a nanoGPT / GPT-2-size model to turn what people say into function calls.

Use a model:

    from fc_lightning import FunctionCaller
    caller = FunctionCaller.from_checkpoint("outputs/checkpoints/best.ckpt")
    caller("make it warmer in the back")  # a FunctionCall
    caller.execute("open my window", {"control_window": lambda window_position, **where: ...})

Train one, as `python -m fc_lightning fit` does:

    import lightning as L
    from fc_lightning import FunctionCallDataModule, FunctionCallModule
    module = FunctionCallModule(pretrained_dir="base", learning_rate=1e-3, lr_decay_iters=None)
    L.Trainer(max_epochs=1).fit(module, FunctionCallDataModule("my_data"))

What there is; `help(fc_lightning.FunctionCaller)` and so on say more:

    FunctionCaller          commands in, validated calls out; execute() runs your functions
    IncompleteCall          what execute() raises if something needed was not said
    FunctionCall            a function's name and its arguments
    parse_call, render_call a call read from, or written as, a model's text

    FunctionCallModule      the LightningModule: exact gradients, warmup-cosine
    FunctionCallDataModule  the LightningDataModule: a folder of examples, or synthesized ones
    GPT, GPTConfig          the network, with nanoGPT's parameter names
    load_gpt                a nanoGPT, Hugging Face or Lightning checkpoint, or "base", as a GPT

    Registry, load_registry the functions of a domain, from one YAML file
    synthesize              examples for training and test, from a registry's sentences
    evaluate                a caller over examples: every measure, as tables and one web page
    CallMetrics             the measures alone, as a torchmetrics Metric

Importing this package imports neither torch nor Lightning: a name brings what it needs when it is
first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fc_lightning.caller import FunctionCaller, IncompleteCall
    from fc_lightning.calls import FunctionCall, parse_call, render_call
    from fc_lightning.checkpoint import load_gpt
    from fc_lightning.datamodule import FunctionCallDataModule
    from fc_lightning.evaluation import evaluate
    from fc_lightning.functions import Registry, load_registry
    from fc_lightning.gpt import GPT, GPTConfig
    from fc_lightning.metrics import CallMetrics
    from fc_lightning.module import FunctionCallModule
    from fc_lightning.synthesis import synthesize

__version__ = "0.1.0"

_HOMES = {
    "GPT": "gpt",
    "CallMetrics": "metrics",
    "FunctionCall": "calls",
    "FunctionCallDataModule": "datamodule",
    "FunctionCallModule": "module",
    "FunctionCaller": "caller",
    "GPTConfig": "gpt",
    "IncompleteCall": "caller",
    "Registry": "functions",
    "evaluate": "evaluation",
    "load_gpt": "checkpoint",
    "load_registry": "functions",
    "parse_call": "calls",
    "render_call": "calls",
    "synthesize": "synthesis",
}
__all__ = [
    "GPT",
    "CallMetrics",
    "FunctionCall",
    "FunctionCallDataModule",
    "FunctionCallModule",
    "FunctionCaller",
    "GPTConfig",
    "IncompleteCall",
    "Registry",
    "evaluate",
    "load_gpt",
    "load_registry",
    "parse_call",
    "render_call",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
