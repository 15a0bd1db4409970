"""What the table of ways to decode says is what was measured."""

import pytest
from rich.console import Console

from fc_lightning.benchmark import _DICTATION, _RESPONSES, SHAPES, _Dictated, benchmark_decode
from fc_lightning.calls import FunctionCall
from fc_lightning.chat import encode_command
from fc_lightning.decoding import generate
from fc_lightning.functions import load_registry
from fc_lightning.gpt import GPT, GPTConfig
from fc_lightning.grammar import compile_grammar

TINY = GPTConfig(n_layer=1, n_head=1, n_embd=8, bias=False)


def test_every_way_is_measured_and_shown_with_its_ratios(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    console = Console(record=True, width=110)
    timings = benchmark_decode(["tiny"], device="cpu", num_commands=3, seconds=0.0, console=console)
    by_way = {t.way: t for t in timings}
    ways = ["constrained, fp32", "constrained, bf16", "constrained, int8", "unconstrained, fp32"]
    assert [way for way in by_way if not way.startswith("transformers")] == [
        *ways,
        "no cache, fp32",
    ]
    assert {t.model for t in timings} == {"tiny, 1 thread"}
    ours, no_cache = by_way["constrained, fp32"], by_way["no cache, fp32"]
    assert no_cache.calls_per_s is None
    said = console.export_text()
    [line] = [
        line for line in said.splitlines() if "constrained, fp32" in line and "un" not in line
    ]
    cells = [cell.strip() for cell in line.split("│")]
    assert f"{ours.ms_per_call:,.1f}" in cells
    assert f"{no_cache.ms_per_call / ours.ms_per_call:.3g}" in cells


def test_every_dictated_call_is_valid_and_as_long_whatever_the_model_prefers():
    registry, model = load_registry(), GPT(TINY).eval()
    for command, name, arguments in _DICTATION:
        assert registry.violations(FunctionCall(name, arguments)) == [], command
    first = compile_grammar(registry)
    generations = generate(
        model,
        [encode_command(command) for command, _, _ in _DICTATION],
        max_new_tokens=128,
        allow=[_Dictated(first, response) for response in _RESPONSES],
    )
    assert [len(g.ids) for g in generations] == [len(response) for response in _RESPONSES]
    assert all(g.is_finished for g in generations)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ("huge", {}, "no shape 'huge'; choose from tiny"),
        ("tiny", {"device": "nonsense"}, "device 'nonsense' can't be used"),
        ("tiny", {"num_commands": 0}, "num_commands must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(shape, options, words):
    with pytest.raises(ValueError, match=words):
        benchmark_decode([shape], **options)
