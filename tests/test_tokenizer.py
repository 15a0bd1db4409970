"""GPT-2's byte-pair encoding, offline, and its special ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fc_lightning import tokenizer
from fc_lightning.tokenizer import END_OF_PROMPT, END_OF_TEXT, PAD, get_encoding


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        (" \n\n  a", [220, 628, 220, 257]),
        ("don't 2024!", [9099, 470, 48609, 0]),
        ("naïve 🚗", [2616, 38776, 12520, 248, 245]),
        ("<functioncall> ", [27, 8818, 13345, 29, 220]),
    ],
)
def test_ids_are_gpt2s(text, ids):
    assert get_encoding().encode_ordinary(text) == ids


def test_special_tokens_stand_behind_gpt2s_own():
    assert (END_OF_TEXT, PAD, END_OF_PROMPT) == (50256, 50257, 50258)
    decoded = [get_encoding().decode([i]) for i in (END_OF_TEXT, PAD, END_OF_PROMPT)]
    assert decoded == ["<|endoftext|>", "<|pad_token|>", "<|eop_token|>"]
    assert get_encoding().n_vocab == tokenizer.NUM_TOKENS <= tokenizer.PADDED_VOCAB_SIZE


def test_literal_markers_become_ordinary_pieces():
    ids = get_encoding().encode_ordinary("<|endoftext|><|pad_token|><|eop_token|>")
    assert max(ids) < END_OF_TEXT


@given(st.text())
def test_any_text_comes_back_whole(text):
    encoding = get_encoding()
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_a_damaged_table_is_refused(tmp_path, monkeypatch):
    damaged = bytearray(tokenizer._TABLE.read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "gpt2.tiktoken").write_bytes(damaged)
    monkeypatch.setattr(tokenizer, "_TABLE", tmp_path / "gpt2.tiktoken")
    with pytest.raises(RuntimeError, match=r"gpt2\.tiktoken is damaged.*reinstall fc_lightning"):
        get_encoding.__wrapped__()
