"""What the table of ways to train says is what was measured."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from training import example

from fc_lightning.benchmark import SHAPES
from fc_lightning.benchmark_train import TrainTiming, _table, benchmark_train
from fc_lightning.dataset import Row
from fc_lightning.gpt import GPTConfig

ROWS = [Row(example(i), Path("train.json"), i) for i in range(8)]


def test_the_table_has_a_line_a_way_with_ratios_to_the_first(monkeypatch):
    tiny = GPTConfig(n_layer=1, n_head=1, n_embd=8, bias=False)
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    monkeypatch.setattr("fc_lightning.benchmark_train.PADDED_LENGTH", 160)
    console = Console(record=True, width=80)
    timings = benchmark_train(
        ROWS, shape="tiny", device="cpu", batch_size=4, seconds=0.0, console=console
    )
    assert [(t.way, t.batch_size, t.num_steps) for t in timings] == [
        ("reference", 1, 1),
        ("longest", 4, 1),
        ("ours", 4, 1),
    ]
    reference, longest, ours = timings
    for t in (longest, ours):
        assert t.examples_per_s == pytest.approx(4000 / t.step_ms)
    # All have read rows of this length, whatever they spent on padding.
    tokens = [t.tokens_per_s / t.examples_per_s for t in timings]
    assert max(tokens) < 160 and min(tokens) > 50
    said = console.export_text()
    ratio = ours.examples_per_s / reference.examples_per_s
    shown = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
    [line] = [line.split() for line in said.splitlines() if line.startswith(" ours")]
    assert line[1] == "4" and line[4] == shown
    assert "…" not in said and "MFU and memory: not known" in said


def test_a_gpu_s_table_fits_into_eighty_columns(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("fc_lightning.benchmark_train.computes_in_bfloat16", lambda device: True)
    monkeypatch.setattr("fc_lightning.benchmark_train.get_available_flops", lambda *_: 989e12)
    timing = TrainTiming("reference", 512, 10, 1211.9, 5538.7, 729412, 296e12, 65_300_000_000)
    console = Console(record=True, width=80)
    console.print(_table([timing], "gpt2", torch.device("cuda")))
    said = console.export_text()
    assert "…" not in said
    for cell in ("1,212", "5,539", "729,412", "296", "29.9%", "65.3"):
        assert f" {cell} " in said


@pytest.fixture
def full_gpu(monkeypatch):
    """A function that times 16 rows where `limits` of rows fit into memory; returns the lines."""
    timed = TrainTiming("ours", 1, 2, 10.0, 100.0, 1e4, 1e12, 10**9)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("fc_lightning.benchmark_train.free_memory", lambda: None)
    monkeypatch.setattr("fc_lightning.benchmark_train.use_device", torch.device)
    monkeypatch.setattr("fc_lightning.benchmark_train.computes_in_bfloat16", lambda device: True)
    monkeypatch.setattr("fc_lightning.benchmark_train.get_available_flops", lambda *_: 1e15)
    monkeypatch.setattr("fc_lightning.benchmark_train._module", lambda *_, **__: torch.nn.Module())

    def measure(**limits):
        def time(module, dataset, way, batch_size, *, seconds):
            if batch_size > limits[way]:
                raise torch.OutOfMemoryError("no memory")
            return replace(timed, way=way, batch_size=batch_size)

        monkeypatch.setattr("fc_lightning.benchmark_train._time", time)
        rows = [Row(example(i), Path("train.json"), i) for i in range(128)]
        timings = benchmark_train(rows, shape="tiny", device="cuda", batch_size=16)
        return [(t.way, t.batch_size) for t in timings]

    return measure


def test_a_way_that_memory_is_too_small_for_takes_fewer_rows(full_gpu):
    whole = [("reference", 16), ("longest", 16), ("ours", 16), ("ours", 64), ("ours", 128)]
    assert full_gpu(reference=16, longest=16, ours=999) == whole
    part = [("reference", 2), ("longest", 8), ("ours", 16), ("ours", 64)]
    assert full_gpu(reference=3, longest=8, ours=64) == part
    least = [("reference", 1), ("longest", 1), ("ours", 4)]
    assert full_gpu(reference=1, longest=1, ours=4) == least


def test_a_row_that_memory_is_too_small_for_is_an_error(full_gpu):
    with pytest.raises(ValueError, match="out of memory with a single row; take a smaller shape"):
        full_gpu(reference=0, longest=16, ours=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": "huge"}, "no shape 'huge'; choose from tiny"),
        ({"device": "nonsense"}, "device 'nonsense' can't be used"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"batch_size": 9}, "8 rows are too few for a batch of 9"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        benchmark_train(ROWS, **{"shape": "tiny", "device": "cpu"} | options)
