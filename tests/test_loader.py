"""Every row in one batch of an epoch, in an order that ranks share and resumed runs go on with."""

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import example

from fc_lightning.dataset import DataError, FunctionCallDataset, Row
from fc_lightning.loader import BatchLoader, LengthBatchSampler


def dataset_of(*examples):
    rows = [Row(example, Path("train.json"), i) for i, example in enumerate(examples)]
    return FunctionCallDataset(rows, block_size=192)


def epoch_of(lengths, *, epoch=0, num_ranks=1, **options):
    """The batches of each rank in one epoch."""
    ranks = []
    for rank in range(num_ranks):
        sampler = LengthBatchSampler(lengths, num_ranks=num_ranks, rank=rank, **options)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=60),
    st.fixed_dictionaries({"batch_size": st.integers(1, 7)})
    | st.fixed_dictionaries({"max_tokens": st.integers(100, 500)}),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None)
def test_each_row_is_in_exactly_one_batch_of_one_rank(lengths, limit, num_ranks, shuffle, sort):
    limit = limit | {"sort_by_length": sort}
    if shuffle and len(lengths) < num_ranks:
        with pytest.raises(DataError, match="can't be shared by"):
            epoch_of(np.array(lengths), num_ranks=num_ranks, **limit)
        return
    ranks = epoch_of(np.array(lengths), num_ranks=num_ranks, shuffle=shuffle, **limit)
    assert len({len(batches) for batches in ranks}) == 1  # all have as many batches
    assert not shuffle or all(rows for batches in ranks for rows in batches)
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 500), st.booleans())
@settings(deadline=None)
def test_a_budget_of_tokens_is_used_up_and_never_overdrawn(lengths, max_tokens, shuffle):
    lengths = np.array(lengths)
    epochs = [
        epoch_of(lengths, max_tokens=max_tokens, shuffle=shuffle, epoch=epoch)[0]
        for epoch in (0, 1)
    ]
    assert len(epochs[0]) == len(epochs[1])
    for batches in epochs:
        assert max(len(rows) * lengths[rows].max() for rows in batches) <= max_tokens
        by_length = sorted(batches, key=lambda rows: lengths[rows].max())
        for rows, next_rows in pairwise(by_length):
            if lengths[next_rows].min() > lengths[rows].max():  # which row came next is known
                assert (len(rows) + 1) * lengths[next_rows].min() > max_tokens


@pytest.mark.parametrize(
    ("of_one", "of_three"),
    [({"batch_size": 6}, {"batch_size": 2}), ({"max_tokens": 300}, {"max_tokens": 100})],
)
def test_ranks_together_see_the_batches_of_one_process(of_one, of_three):
    lengths = np.random.default_rng(0).integers(1, 50, 23)
    (one,) = epoch_of(lengths, seed=3, **of_one)
    ranks = epoch_of(lengths, num_ranks=3, seed=3, **of_three)
    together = [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(rows) for rows in one]


def test_accumulated_batches_of_any_lengths_hold_what_a_larger_batch_does():
    lengths = np.arange(1, 24)
    (large,) = epoch_of(lengths, batch_size=8, sort_by_length=False)
    (small,) = epoch_of(lengths, batch_size=4, sort_by_length=False)
    assert [small[i] + small[i + 1] for i in range(0, 6, 2)] == large
    ranks = epoch_of(lengths, batch_size=2, num_ranks=2, sort_by_length=False)
    together = [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(rows) for rows in small]


def test_an_epochs_order_follows_from_seed_and_epoch_alone():
    lengths = np.arange(40)
    first = epoch_of(lengths, batch_size=4, seed=1, epoch=2)
    np.random.default_rng().random()
    torch.rand(1)
    assert first == epoch_of(lengths, batch_size=4, seed=1, epoch=2)
    assert first != epoch_of(lengths, batch_size=4, seed=1, epoch=3)
    assert first != epoch_of(lengths, batch_size=4, seed=2, epoch=2)


def test_without_sorting_rows_of_any_lengths_meet_and_a_budget_sorts_them_all_the_same():
    lengths = np.arange(1, 401)
    (batches,) = epoch_of(lengths, batch_size=8, sort_by_length=False)
    assert np.median([np.ptp(lengths[rows]) for rows in batches]) > 200
    assert epoch_of(lengths, batch_size=8, sort_by_length=False, epoch=1) != [batches]
    budget = {"max_tokens": 2000}
    assert epoch_of(lengths, sort_by_length=False, **budget) == epoch_of(lengths, **budget)


def test_rows_of_a_batch_are_of_like_length():
    lengths = np.random.default_rng(0).permutation(400)
    (batches,) = epoch_of(lengths, batch_size=8)
    spans = [int(np.ptp(lengths[rows])) for rows in batches]
    assert max(spans) == 7  # 400 rows are one chunk of 50 batches, sorted whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_where_its_state_was_taken(num_workers):
    dataset = dataset_of(*map(example, range(11)))

    def make():
        sampler = LengthBatchSampler(dataset.lengths, batch_size=3, seed=1)
        return BatchLoader(dataset, sampler, num_workers=num_workers)

    whole = make()
    expected = [[batch.rows for batch in whole]]
    whole.sampler.set_epoch(1)
    expected.append([batch.rows for batch in whole])
    assert expected[0] != expected[1]
    stopped = make()
    batches = iter(stopped)
    assert [next(batches).rows for _ in range(2)] == expected[0][:2]
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict()  # before its first batch, too
    iter(resumed)  # one that nobody reads, as Lightning makes them
    assert [batch.rows for batch in resumed] == expected[0][2:]
    resumed.sampler.set_epoch(1)
    assert [batch.rows for batch in resumed] == expected[1]


def test_a_loader_leaves_the_random_state_alone():
    dataset = dataset_of(*map(example, range(5)))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(BatchLoader(dataset, LengthBatchSampler(dataset.lengths, batch_size=2), num_workers=1))
    assert torch.equal(torch.rand(1), expected)
