"""Decoding against the plainest loop there is: a full forward pass for every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fc_lightning.decoding import Anything, _without_cudnn_attention, choose, generate, prefill
from fc_lightning.gpt import GPT, GPTConfig
from fc_lightning.tokenizer import END_OF_TEXT

torch.set_num_threads(1)  # models this small only lose by more
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 1], [5, 6, 7, 50, 60, 70, 80, 90, 100, 11, 12], [9]]


def tiny_gpt(seed: int = 0) -> GPT:
    """A model that looks at its positions more than at the last token, and so often ends."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=48, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        model.lm_head.weight[120:END_OF_TEXT] = 0
        model.lm_head.weight[END_OF_TEXT] *= 4
        model.transformer.wpe.weight.normal_(std=0.3)
    return model


@dataclass(frozen=True)
class Script:
    """Forced runs and choices, one after the other, whatever is chosen."""

    runs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def forced(self) -> Sequence[int]:
        return self.runs[0][0]

    @property
    def allowed(self) -> Tensor:
        return torch.tensor(self.runs[0][1], dtype=torch.long)

    def after(self, token: int) -> Script:
        assert token in self.runs[0][1]
        return Script(self.runs[1:])


SCRIPT = Script((((1, 2, 3), (4, 5, 6)), ((), (7, 8)), ((9,), (10, 11, 12)), ((13, 14), ())))


def full_forward(model: GPT, prompt: list[int], num_tokens: int) -> list[int]:
    ids, device = list(prompt), model.lm_head.weight.device
    while len(ids) < len(prompt) + num_tokens and ids[-1] != END_OF_TEXT:
        ids.append(int(model(torch.tensor([ids], device=device))[0, -1].argmax()))
    return ids[len(prompt) :]


def full_forward_by_script(
    model: GPT, prompt: list[int], script: Script
) -> tuple[list[int], float]:
    ids, log_probability = list(prompt), 0.0
    for forced, allowed in script.runs:
        ids += forced
        if allowed:
            chances = model(torch.tensor([ids]))[0, -1, list(allowed)].log_softmax(dim=0)
            ids.append(allowed[int(chances.argmax())])
            log_probability += float(chances.max())
    return ids[len(prompt) :], log_probability


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_cached_decoding_matches_the_full_forward_pass(device: str) -> None:
    for seed in range(3):
        model = tiny_gpt(seed).to(device)
        expected = [full_forward(model, prompt, 30) for prompt in PROMPTS]
        assert len({len(ids) for ids in expected}) > 1  # rows end at different times
        generations = generate(model, PROMPTS, max_new_tokens=30)
        assert [g.ids for g in generations] == expected
        assert [g.is_finished for g in generations] == [i[-1] == END_OF_TEXT for i in expected]


@pytest.mark.parametrize("prefix", [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 1], [2], []])
@torch.no_grad()
def test_a_shared_prefix_changes_nothing(prefix: list[int]) -> None:
    model = tiny_gpt()
    expected = [g.ids for g in generate(model, PROMPTS, max_new_tokens=12)]
    for rows in (slice(0, 3), slice(0, 4)):
        generations = generate(
            model, PROMPTS[rows], max_new_tokens=12, prefix=prefill(model, prefix)
        )
        assert [g.ids for g in generations] == expected[rows]


@torch.no_grad()
def test_forced_and_allowed_tokens_match_the_full_forward_pass() -> None:
    model = tiny_gpt()
    scripts = [SCRIPT, Script(SCRIPT.runs[1:]), Script(SCRIPT.runs[3:])]
    for script in scripts:
        generations = generate(model, PROMPTS, max_new_tokens=20, allow=script)
        for prompt, generation in zip(PROMPTS, generations, strict=True):
            ids, log_probability = full_forward_by_script(model, prompt, script)
            assert generation.ids == ids
            # float32, summed in another order
            assert generation.log_probability == pytest.approx(log_probability, abs=1e-4)
            assert generation.num_decisions == len(script.runs) - 1


def test_forced_tokens_are_fed_along_with_the_choice_before_them() -> None:
    model, fed = tiny_gpt(), []
    hidden_states = model.hidden_states
    model.hidden_states = lambda ids, **kwargs: (
        fed.append(ids.tolist()),
        hidden_states(ids, **kwargs),
    )[1]  # type: ignore[method-assign]
    (generation,) = generate(model, [[20, 21]], max_new_tokens=20, allow=SCRIPT)
    first, second, third = (generation.ids[i] for i in (3, 4, 6))
    assert fed == [[[20, 21, 1, 2, 3]], [[first]], [[second, 9]]]  # and the end not at all
    assert generation.ids[6:] == [third, 13, 14]


def test_a_response_without_choices_needs_no_forward_pass() -> None:
    model = tiny_gpt()
    model.transformer.h = None  # a forward pass would fail
    (generation,) = generate(model, [[1]], max_new_tokens=9, allow=Script((((3, 4), ()),)))
    assert (generation.ids, generation.log_probability) == ([3, 4], 0.0)


def test_each_row_may_be_allowed_something_else() -> None:
    scripts = [SCRIPT, Anything(), Script(SCRIPT.runs[3:]), Script(SCRIPT.runs[1:])]
    together = generate(tiny_gpt(), PROMPTS, max_new_tokens=9, allow=scripts)
    for prompt, script, generation in zip(PROMPTS, scripts, together, strict=True):
        (alone,) = generate(tiny_gpt(), [prompt], max_new_tokens=9, allow=script)
        assert alone.ids == generation.ids


def test_rows_that_end_early_do_not_disturb_sampling() -> None:
    scripts = [Script(SCRIPT.runs[1:]), *[SCRIPT] * 7]  # one of eight stays in the batch, done
    prompts = [[5, 6, n] for n in range(8)]
    generations = generate(
        tiny_gpt(),
        prompts,
        max_new_tokens=9,
        allow=scripts,
        temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert [g.num_decisions for g in generations] == [2] + [3] * 7


def test_log_probability_is_that_of_the_chosen_tokens() -> None:
    model = tiny_gpt()
    (generation,) = generate(model, [[5, 6]], max_new_tokens=3)
    logits = model(torch.tensor([[5, 6, *generation.ids[:2]]]))[0, 1:].detach()
    expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(generation.ids)[:, None]).sum()
    assert generation.log_probability == pytest.approx(float(expected), abs=1e-4)


def test_a_mask_and_a_list_of_ids_allow_the_same() -> None:
    model, states = tiny_gpt(), torch.randn(3, 16)
    ids = [torch.tensor([3, 4, 40]), torch.tensor([7]), torch.tensor([1, 2])]
    masks = [torch.zeros(50304, dtype=torch.bool).index_fill(0, row, True) for row in ids]
    few = choose(model, states, ids)
    for allowed in (masks, [ids[0], *masks[1:]], [masks[0], ids[1], masks[2]]):
        many = choose(model, states, allowed)
        assert [token for token, _ in few] == [token for token, _ in many]
        assert [p for _, p in few] == pytest.approx([p for _, p in many], abs=1e-6)


def test_sampling_follows_the_model_and_the_generator() -> None:
    model = GPT(GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=3))
    model.lm_head.weight = model.transformer.wte.weight = torch.nn.Parameter(torch.eye(3))
    states = torch.tensor([[math.log(1.0), math.log(3.0), 9.0]]).expand(4000, 3)
    for temperature, share in ((1.0, 3 / 4), (0.5, 9 / 10)):
        choices = choose(
            model,
            states,
            [torch.tensor([0, 1])] * 4000,
            temperature=temperature,
            generator=torch.Generator().manual_seed(0),
        )
        # four standard deviations of a share of 4,000
        sampled = sum(token for token, _ in choices) / 4000
        assert sampled == pytest.approx(share, abs=4 * math.sqrt(share / 4 / 4000))
        assert dict(choices)[1] == pytest.approx(math.log(3 / 4))
    model = tiny_gpt()
    first, again, other = (
        generate(
            model,
            PROMPTS,
            max_new_tokens=8,
            temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_keys_and_values_have_the_precision_of_autocast() -> None:
    model = tiny_gpt()
    assert prefill(model, [5, 6]).cache.entries.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        prefix = prefill(model, [5, 6])
        assert prefix.cache.entries.dtype == torch.bfloat16
        assert len(generate(model, PROMPTS, max_new_tokens=5, prefix=prefix)) == len(PROMPTS)


def test_the_last_thread_turns_the_switch_of_attention_back() -> None:
    """Threads may leave in the order they came in, unlike nested context managers."""
    first, second = _without_cudnn_attention(), _without_cudnn_attention()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_no_prompts_give_no_responses() -> None:
    assert generate(tiny_gpt(), [], max_new_tokens=5) == []


def test_everything_is_allowed_without_a_constraint() -> None:
    assert Anything().after(3) == Anything()
    assert (Anything().forced, Anything().allowed) == ((), None)


def test_what_does_not_fit_into_the_model_is_an_error_and_never_cut() -> None:
    model = tiny_gpt()
    assert generate(model, [[1] * 40], max_new_tokens=8)
    with pytest.raises(ValueError, match=r"41 tokens and up to 8 new .* 48 positions"):
        generate(model, [[1], [1] * 41], max_new_tokens=8)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, [[1], []], max_new_tokens=8)


@torch.no_grad()
def test_allowed_ids_are_compared_in_float32() -> None:
    model = tiny_gpt().bfloat16()
    states, ids = torch.randn(3, 16).bfloat16(), torch.tensor([4, 5, 6])
    exact = states.float() @ model.lm_head.weight[ids].float().T
    choices = choose(model, states, [ids] * 3)
    assert [token for token, _ in choices] == ids[exact.argmax(dim=1)].tolist()
    expected = exact.log_softmax(dim=1).amax(dim=1).tolist()
    # float32; in bf16 they would be off by some thousandths
    assert [p for _, p in choices] == pytest.approx(expected, abs=1e-6)
