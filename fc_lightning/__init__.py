"""Fine-tune a nanoGPT / GPT-2-size model to turn what people say into function calls.

    from fc_lightning import FunctionCaller
    caller = FunctionCaller.from_checkpoint("outputs/checkpoints/best.ckpt")
    caller("make it warmer in the back")

Train with `python -m fc_lightning fit`, or with `FunctionCallModule` and `FunctionCallDataModule`
under any `lightning.Trainer`. Importing this package imports neither torch nor Lightning: a public
name brings what it needs when it is first used.
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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
