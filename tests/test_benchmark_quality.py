"""Time to quality counts training alone, stops at its goal or limit, and says which."""

import time

import pytest
import torch
from rich.console import Console
from training import write_rows

from fc_lightning.benchmark import SHAPES
from fc_lightning.benchmark_quality import _Run, benchmark_quality
from fc_lightning.gpt import GPTConfig


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that measures a tiny model on four rows, and returns what is said too."""
    monkeypatch.setitem(SHAPES, "tiny", GPTConfig(n_layer=1, n_head=1, n_embd=8, bias=False))
    monkeypatch.setattr("fc_lightning.benchmark_quality.GPT2_BLOCK_SIZE", 160)
    data, console = write_rows(tmp_path / "data", 4, 2), Console(record=True, width=100)

    def measure(**options):
        always = {"shape": "tiny", "device": "cpu", "batch_size": 2, "console": console}
        reached = benchmark_quality(data, **always | options)
        return reached, console.export_text()

    return measure


def test_a_goal_ends_the_clock_and_a_limit_ends_training(measure):
    (reference, ours), said = measure(loss=10.6, match=0.5, limit_s=2.0, learning_rate=1e-2)
    # A rate of 5e-6 after 2,000 steps leads nowhere in two seconds; a model that has learned
    # which tokens occur at all is better than one that takes all for equal.
    assert reference.loss_s is None and reference.lowest_loss == pytest.approx(10.8, abs=0.1)
    assert ours.loss_s is not None and ours.lowest_loss < 10.6
    assert ours.match_s is None and ours.highest_match == 0.0
    # Eight passes over 160 positions a row take longer than ours, which took the steps.
    assert reference.trained_s > 4.0 and 2.0 < ours.trained_s < 4.0
    assert f"{ours.loss_s:.1f} s" in said
    assert f"not in {reference.trained_s:,.1f} s (reached 10.8" in said
    assert f"more than {reference.trained_s / ours.loss_s:,.1f}" in said and "not known" in said


def test_both_goals_end_a_run_at_once(measure):
    reached, said = measure(loss=20.0, match=0.0, limit_s=60.0)
    for q in reached:
        assert q.loss_s == q.match_s > 0
    assert f"{reached[0].loss_s / reached[1].loss_s:,.1f}" in said


def test_evaluating_takes_none_of_the_time(measure, monkeypatch):
    def match_slowly(run):
        time.sleep(2.0)
        return 0.0

    monkeypatch.setattr(_Run, "_match", match_slowly)
    (_, ours), _ = measure(loss=20.0, match=0.0, limit_s=60.0)
    assert ours.loss_s < 2.0


def test_muon_has_a_rate_of_its_own(measure, monkeypatch):
    rates, until = [], _Run.until

    def noting(run, **options):
        rates.append([group["lr"] for group in run.optimizer.param_groups])
        return until(run, **options)

    monkeypatch.setattr(_Run, "until", noting)
    measure(loss=20.0, match=0.0, limit_s=60.0, learning_rate=1e-2, muon_lr=0.5)
    reference, ours = rates
    # The first steps of 2,000 and of 20 that warm up.
    assert reference == pytest.approx([5e-6 / 2001] * len(reference))
    assert sorted(set(ours)) == pytest.approx([1e-2 / 21, 0.5 / 21])


def test_a_batch_too_large_for_memory_is_timed_in_parts(measure, monkeypatch):
    tried = []

    def gradient_s(run, num_rows):
        tried.append(num_rows)
        if num_rows == 2:
            raise torch.OutOfMemoryError("no memory")
        return 100.0

    monkeypatch.setattr(_Run, "_gradient_s", gradient_s)
    (reference, _), _ = measure(loss=20.0, match=0.0, limit_s=60.0)
    assert tried == [2, 1]
    assert reference.trained_s == 2 * 100.0 * reference.num_steps


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": "huge"}, "no shape 'huge'; choose from tiny"),
        ({"device": "nonsense"}, "device 'nonsense' can't be used"),
        ({"limit_s": 0.0}, "limit_s must be above 0, not 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_steps": 0}, "num_steps must be above 0, not 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, not 0.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, options, words):
    with pytest.raises(ValueError, match=words):
        measure(**{"loss": 20.0, "match": 0.0, "limit_s": 0.1} | options)
