"""Rows to tokens, masks and batches, and the order of an epoch; all of it exact."""

import json
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import example

from fc_lightning.chat import Example
from fc_lightning.dataset import (
    DataError,
    FunctionCallDataset,
    Row,
    read_rows,
)
from fc_lightning.tokenizer import END_OF_PROMPT, END_OF_TEXT, PAD, get_encoding


def rows_of(examples):
    return [Row(example, Path("train.json"), i) for i, example in enumerate(examples)]


def dataset_of(*examples, block_size=192):
    return FunctionCallDataset(rows_of(examples), block_size=block_size)


def encode(text):
    return get_encoding().encode_ordinary(text)


# ---------------------------------------------------------------- files


def test_train_and_test_files_are_told_by_their_names_and_joined_in_order(tmp_path):
    for name in ("b_train.json", "a_train.json", "my_test.json", "other.json"):
        (tmp_path / name).write_text(json.dumps([vars(example(0)), vars(example(1))]))
    found = [(row.file.name, row.number) for row in read_rows(tmp_path, "train")]
    assert found == [
        ("a_train.json", 0),
        ("a_train.json", 1),
        ("b_train.json", 0),
        ("b_train.json", 1),
    ]
    assert {row.file.name for row in read_rows(tmp_path, "test")} == {"my_test.json"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.json: not valid JSON"),
        (b"\xff\xfe", "train.json: not valid JSON"),
        (b"[" * 100_000, "train.json: not valid JSON"),
        (b"{}", "must be a JSON list of examples, not a dict"),
        (b"[]", "holds no example"),
        (b"[1]", "row 0: needs exactly the keys system, user, assistant; found int"),
        (b'[{"system": "", "user": ""}]', "row 0: needs exactly the keys"),
        (b'[{"system": "", "user": "", "assistant": 3}]', "row 0: 'assistant' must be a string"),
        (b'[{"system": "", "user": "x", "assistant": " "}]', "row 0: the response is empty"),
        (
            rb'[{"system": "", "user": "<|im_start|>user\n<|im_end|>\n", "assistant": "x"}]',
            "row 0: the command is empty",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why(tmp_path, content, message):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path, "train")


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_any_bytes_end_in_rows_or_in_a_clear_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any_train.json"
    file.write_bytes(content)
    try:
        read_rows(file)
    except DataError as error:
        assert str(file) in str(error)


# ---------------------------------------------------------------- masks


def test_a_batch_trains_the_response_and_its_end_and_nothing_else():
    examples = [Example("s", "u", "call one"), Example("s", "u u u", "x")]
    dataset = dataset_of(*examples)
    dataset.prefix_length = 0
    batch = dataset[[0, 1]]
    for i, e in enumerate(examples):
        prompt = encode(f"system: {e.system}\nuser: {e.user}\n")
        response = encode(f"assistant: {e.assistant}")
        ids = [*prompt, END_OF_PROMPT, *response]
        padding = [PAD] * (batch.ids.size(1) - len(ids))
        assert batch.ids[i].tolist() == ids + padding
        assert batch.lengths[i] == len(ids)
        # END_OF_PROMPT predicts the first response token, the last one END_OF_TEXT.
        is_trained = [False] * len(prompt) + [True] * (1 + len(response)) + [False] * len(padding)
        assert batch.is_trained[i].tolist() == is_trained
    targets = [[*encode(f"assistant: {e.assistant}"), END_OF_TEXT] for e in examples]
    assert batch.targets.tolist() == list(chain(*targets))


def test_rows_share_a_prefix_that_ends_where_the_first_of_them_differs():
    examples = [Example("same system", f"user {word}", "call") for word in ("one", "two")]
    dataset = dataset_of(*examples)
    shared = encode("system: same system\nuser: user")
    assert dataset.prefix_length == len(shared)
    batch = dataset[[1, 0]]
    assert batch.prefix.tolist() == shared
    for i, row in enumerate((1, 0)):
        assert [*shared, *batch.ids[i].tolist(), END_OF_TEXT] == dataset.row_ids(row).tolist()


def test_the_prefix_of_equal_prompts_leaves_the_end_of_the_prompt_to_the_rows():
    batch = dataset_of(Example("s", "u", "one"), Example("s", "u", "two"))[[0, 1]]
    assert batch.prefix.tolist() == encode("system: s\nuser: u\n")
    assert batch.ids[:, 0].tolist() == [END_OF_PROMPT, END_OF_PROMPT]
    assert batch.is_trained.all()


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6), st.data()
)
@settings(max_examples=50, deadline=None)
def test_collation_of_any_lengths_puts_rows_together_again(lengths, data):
    dataset = dataset_of(*(Example("s", "a " * p, "b " * r) for p, r in lengths))
    rows = data.draw(st.permutations(range(len(lengths))))
    batch = dataset[rows]
    targets = batch.targets.split(batch.is_trained.sum(dim=1).tolist())
    for i, row in enumerate(rows):
        length, num_prompt = batch.lengths[i], int(dataset.prompt_lengths[row])
        ids = [*batch.prefix.tolist(), *batch.ids[i, :length].tolist(), END_OF_TEXT]
        assert ids == dataset.row_ids(row).tolist()
        assert (batch.ids[i, length:] == PAD).all() and not batch.is_trained[i, length:].any()
        assert targets[i].tolist() == ids[num_prompt:]
        trained = batch.is_trained[i].nonzero().flatten() + len(batch.prefix)
        assert trained.tolist() == list(range(num_prompt - 1, len(ids) - 1))
    assert batch.num_tokens == sum(int(dataset.lengths[row]) - 1 for row in rows)


@given(st.lists(st.integers(0, 14), min_size=1, max_size=40))
@settings(deadline=None)
def test_packed_rows_are_the_padded_ones_without_their_padding(rows):
    dataset = dataset_of(*(example(i) for i in range(15)))
    padded = dataset[rows]
    packed = dataset.packed(rows)
    assert packed.rows == padded.rows and packed.lengths == padded.lengths
    assert packed.num_tokens == padded.num_tokens
    assert torch.equal(packed.prefix, padded.prefix) and torch.equal(packed.targets, padded.targets)
    bounds = packed.starts.tolist()
    assert bounds[0] == 0 and len(bounds) == len(rows) + 1
    for i, (start, end) in enumerate(pairwise(bounds)):
        assert end - start == padded.lengths[i]
        for of_packed, of_padded in zip(
            (packed.ids, packed.is_trained), (padded.ids, padded.is_trained), strict=True
        ):
            assert torch.equal(of_packed[start:end], of_padded[i, : end - start])
    rest = packed.ids[bounds[-1] :]
    assert (rest == PAD).all() and not packed.is_trained[bounds[-1] :].any() and len(rest) < 256
    assert (len(packed.prefix) + len(packed.ids)) % 256 == 0


def test_packed_batches_of_many_rows_have_few_shapes_and_little_padding():
    dataset = dataset_of(*(example(i) for i in range(600)))
    batches = [dataset.packed(torch.randperm(600)[:300].tolist()) for _ in range(20)]
    assert len({batch.ids.shape for batch in batches}) <= 4
    assert all(sum(batch.lengths) > len(batch.ids) * 31 / 32 - 1 for batch in batches)


def test_rows_longer_than_the_block_are_left_out_whole_and_listed():
    prompt, response = "system: s\nuser: u\n", "assistant: one two three"
    needed = len(encode(prompt)) + 1 + len(encode(response))
    examples = [
        Example("s", "u", "one two three"),
        Example("s", "u u", "one two three"),
        Example("s", "u", "one"),
    ]
    dataset = dataset_of(*examples, block_size=needed)
    assert [row.number for row in dataset.rows] == [0, 2]
    assert [(row.number, length) for row, length in dataset.too_long] == [(1, needed + 1)]
    assert [row.number for row in dataset_of(*examples, block_size=needed - 1).rows] == [2]
