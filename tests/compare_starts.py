"""What a base is worth: the same fine-tuning from several starts, scored on real commands.

    python tests/compare_starts.py DATA_DIR --start random none 1e-3 --start shipped base 1e-3 \\
        --start 124M outputs/pretrain/checkpoints/best.ckpt 5e-4

Each start (name, checkpoint or none, AdamW's learning rate) is fine-tuned with Muon at 0.01 for
the matrices, on synthesized rows, once for each number of steps, with a schedule as long
as that, and answers DATA_DIR's commands.
Writes starts.json and starts.png into the output folder after every run, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from rich.console import Console

from fc_lightning.caller import FunctionCaller
from fc_lightning.datamodule import FunctionCallDataModule
from fc_lightning.dataset import Row, read_rows
from fc_lightning.evaluation import evaluate
from fc_lightning.module import FunctionCallModule


def fine_tune(
    checkpoint: str | None, learning_rate: float, max_steps: int, data: FunctionCallDataModule
) -> FunctionCallModule:
    """One pass over as many synthesized rows as the steps take, learning rate down to its end."""
    L.seed_everything(1337, verbose=False)
    module = FunctionCallModule(
        checkpoint,
        learning_rate=learning_rate,
        min_lr=learning_rate / 100,
        optimizer="muon",
        muon_lr=0.01,
        warmup_iters=max(1, min(100, max_steps // 10)),
        lr_decay_iters=None,
        dropout=0.0,
    )
    trainer = L.Trainer(
        max_steps=max_steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


def score(module: FunctionCallModule, data: FunctionCallDataModule, rows: list[Row]) -> dict:
    """Measures of constrained greedy answers, over complete and over incomplete requests."""
    # Where it was trained: Lightning leaves a trained module on the CPU.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    caller = FunctionCaller(module.gpt.to(device), data.registry)
    report = evaluate(caller, rows, console=Console(quiet=True)).constrained.as_json()
    kinds = ("num_examples", "call_match", "call_match_interval", "function_match")
    return {part: {k: report[part][k] for k in kinds} for part in ("complete", "incomplete")}


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Call match on complete requests against steps, a line with its interval for each start."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(result["start"] for result in results):
        runs = [result for result in results if result["start"] == name]
        steps = [run["steps"] for run in runs]
        axes.plot(steps, [100 * run["complete"]["call_match"] for run in runs], "o-", label=name)
        low, high = zip(*(run["complete"]["call_match_interval"] for run in runs), strict=True)
        axes.fill_between(steps, [100 * x for x in low], [100 * x for x in high], alpha=0.15)
    axes.set(xscale="log", xlabel="fine-tuning steps", ylabel="call match, complete requests, %")
    axes.set_xticks(steps, [f"{n:,}" for n in steps], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", nargs=3, action="append", required=True, metavar="X")
    parser.add_argument("--split", default="test", help="of DATA_DIR, to be answered")
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 300, 1000, 3000])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_examples", type=int, help="synthesized, where not all runs are here")
    parser.add_argument("--output", type=Path, default=Path("outputs/starts"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.folder, options.split)
    num_examples = options.num_examples or max(options.steps) * options.batch_size * 10 // 9 + 10
    data = FunctionCallDataModule(batch_size=options.batch_size, num_examples=num_examples)
    results = []
    for name, checkpoint, learning_rate in options.start:
        for max_steps in options.steps:
            start = time.perf_counter()
            path = None if checkpoint == "none" else checkpoint
            module = fine_tune(path, float(learning_rate), max_steps, data)
            duration_s = time.perf_counter() - start
            run = {"start": name, "steps": max_steps, "training_s": round(duration_s, 1)}
            results.append(run | score(module, data, rows))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
            (options.output / "starts.json").write_text(json.dumps(results, indent=1))
            draw(results, options.output / "starts.png")
    for name in dict.fromkeys(result["start"] for result in results):
        matches = [r["complete"]["call_match"] for r in results if r["start"] == name]
        print(f"| {name} | " + " | ".join(f"{match:.1%}" for match in matches) + " |")


if __name__ == "__main__":
    main()
