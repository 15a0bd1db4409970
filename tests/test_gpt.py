"""The network: nanoGPT's names and shapes, causality, the cache, the shared prefix."""

import pytest
import torch
import torch.nn.functional as F

from fc_lightning import gpt
from fc_lightning.gpt import GPT, GPTConfig, KVCache

TINY = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 8}


def tiny_gpt(**changes) -> GPT:
    """A model whose weights are all random, biases too, and large enough to tell tokens apart."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def test_parameters_bear_nanogpts_names_in_its_order():
    names = list(GPT(GPTConfig(**TINY | {"n_layer": 1})).state_dict())
    assert names == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.0.ln_1.bias",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.attn.c_proj.bias",
        "transformer.h.0.ln_2.weight",
        "transformer.h.0.ln_2.bias",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_fc.bias",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.0.mlp.c_proj.bias",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
    ]


def test_without_bias_there_is_none():
    assert not [name for name, _ in GPT(GPTConfig(**TINY, bias=False)).named_parameters()
                if name.endswith("bias")]  # fmt: skip


def test_gpt2_124m_has_its_published_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.num_parameters() == 124_439_808


def test_head_and_embedding_are_one_tensor():
    model = GPT(GPTConfig(**TINY))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_residual_projections_start_smaller_by_depth():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=8, n_head=2, n_embd=128))
    block = model.transformer.h[3]
    # 65,536 draws: the sample's deviation is within 1 % of the true one.
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert not block.mlp.c_fc.bias.any()


def test_a_later_token_changes_no_earlier_logit():
    model, ids = tiny_gpt(), random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % TINY["vocab_size"]
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(-1).min() > 1e-3


def test_tanh_and_exact_gelu_are_told_apart():
    ids = random_ids(1, 10)
    with torch.no_grad():
        exact, tanh = tiny_gpt(gelu="exact")(ids), tiny_gpt(gelu="tanh")(ids)
    assert 1e-6 < (exact - tanh).abs().max() < 0.1


def test_dropout_acts_in_training_alone():
    model, ids = tiny_gpt(dropout=0.5), random_ids(1, 10)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_cached_decoding_matches_full_forward_with_rows_at_different_positions():
    model, ids, lengths = tiny_gpt(), random_ids(3, 12), torch.tensor([5, 2, 4])
    cache = KVCache(model.config, batch_size=3, num_positions=12)
    rows = torch.arange(3)
    with torch.no_grad():
        full = model(ids)
        # Prompts of 5, 2 and 4 tokens go in together, the short ones padded on the right.
        first = torch.where(torch.arange(5) < lengths[:, None], ids[:, :5], 0)
        logits = model(first, positions=torch.arange(5).expand(3, 5), cache=cache)
        torch.testing.assert_close(logits[rows, lengths - 1], full[rows, lengths - 1])
        for step in range(7):
            at = lengths + step
            one = model(ids[rows, at][:, None], positions=at[:, None], cache=cache)
            torch.testing.assert_close(one[:, 0], full[rows, at])


def test_several_tokens_at_once_after_a_cached_prefix_match_full_forward():
    model, ids = tiny_gpt(bias=False), random_ids(2, 9)
    cache = KVCache(model.config, batch_size=2, num_positions=16)
    with torch.no_grad():
        model(ids[:, :4], positions=torch.arange(4).expand(2, 4), cache=cache)
        rest = model(ids[:, 4:], positions=torch.arange(4, 9).expand(2, 5), cache=cache)
        torch.testing.assert_close(rest, model(ids)[:, 4:])


def test_a_cache_laid_out_for_more_rows_and_positions_decodes_as_before():
    model, prefix, rows = tiny_gpt(), random_ids(2, 4), random_ids(3, 5)
    owners = [1, 0, 1]  # which cached prefix each row follows
    cache = KVCache(model.config, batch_size=2, num_positions=4)
    with torch.no_grad():
        model(prefix, positions=torch.arange(4).expand(2, 4), cache=cache)
        wider = cache.resized(owners, 12)
        at = torch.arange(4, 9).expand(3, 5)
        logits = model(rows, positions=at, cache=wider.first(9))
        full = model(torch.cat([prefix[owners], rows], dim=1))
    torch.testing.assert_close(logits, full[:, 4:])
    assert wider.first(9).num_positions == 9
    assert (
        wider.entries[..., 8, :].any() and not wider.entries[..., 9:, :].any()
    )  # memory is shared


def test_a_cache_needs_positions():
    model = tiny_gpt()
    with pytest.raises(AssertionError, match="where the tokens stand"):
        model(random_ids(1, 3), cache=KVCache(model.config, 1, 16))


@pytest.mark.parametrize("prefix_length", [0, 1, 5])
def test_a_shared_prefix_changes_neither_states_nor_gradients(prefix_length):
    model = tiny_gpt()
    prefix, rows = random_ids(5)[:prefix_length], random_ids(3, 7)
    whole = torch.cat([prefix.expand(3, -1), rows], dim=1)
    weighting = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(2))

    def states_and_gradients(states):
        gradients = torch.autograd.grad((states * weighting).sum(), list(model.parameters()))
        return states, gradients

    expected = states_and_gradients(model.hidden_states(whole)[:, prefix_length:])
    shared = states_and_gradients(model.hidden_states_after(prefix, rows))
    # Sums over rows and prefix are taken in another order: float32 noise on values up to 100.
    torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-4)


def test_more_tokens_than_positions_are_refused():
    model = tiny_gpt()
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        model(random_ids(1, 17))
    with pytest.raises(ValueError, match="17 tokens, but the model has 16 positions"):
        model.hidden_states_after(random_ids(5), random_ids(2, 12))


def test_cropping_keeps_the_first_positions_and_their_logits():
    model, ids = tiny_gpt(), random_ids(1, 6)
    before = model(ids)
    model.crop_block_size(6)
    assert model.config.block_size == 6
    assert model.state_dict()["transformer.wpe.weight"].shape == (6, 8)
    assert torch.equal(model(ids), before)


def test_cropping_to_more_than_there_is_names_both_sizes():
    with pytest.raises(ValueError, match="block_size 17 exceeds the checkpoint's 16 positions"):
        tiny_gpt().crop_block_size(17)
    with pytest.raises(ValueError, match="block_size must be at least 1, not 0"):
        tiny_gpt().crop_block_size(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 3}, "n_embd 8 is not divisible by n_head 3"),
        ({"n_head": 0}, "n_head must be at least 1, not 0"),
        ({"gelu": "relu"}, "gelu must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**TINY | changes)


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_written_out_for_bf16_on_a_cpu_is_the_same(is_masked):
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 5, 4).bfloat16().requires_grad_() for _ in range(3)]
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if is_masked else None
    ours = gpt._attend(*parts, mask, 0.0)
    exact = [part.detach().float().requires_grad_() for part in parts]
    theirs = F.scaled_dot_product_attention(*exact, is_causal=True)
    ours.float().square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(ours.float(), theirs, atol=0.02, rtol=0.02)  # bf16 has 8 bits
    for part, reference in zip(parts, exact, strict=True):
        torch.testing.assert_close(part.grad.float(), reference.grad, atol=0.1, rtol=0.05)
