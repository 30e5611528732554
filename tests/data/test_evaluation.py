"""Evaluation gives every sample once over the ranks, in as many turns on each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mlsys_engine.data import evaluation_shares
from tests.data.datasets import Numbers, ShardedStream


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 6), st.booleans())
def test_each_sample_comes_once_and_all_ranks_take_equally_many_turns(size, batch_size, shards, shuffle):
    loader = DataLoader(Numbers(size), batch_size=batch_size, shuffle=shuffle)
    ranks = [list(evaluation_shares(loader, rank, shards)) for rank in range(shards)]
    assert {len(turns) for turns in ranks} == {-(-size // batch_size)}
    seen = [
        number
        for shares in zip(*ranks, strict=True)
        for share in shares
        if share is not None
        for number in share.tolist()
    ]
    assert seen == list(range(size))


def test_a_rank_without_a_share_is_given_none():
    loader = DataLoader(Numbers(5), batch_size=4)
    assert [list(evaluation_shares(loader, rank, 4))[-1] is None for rank in range(4)] == [
        False,
        True,
        True,
        True,
    ]


def test_a_batch_smaller_than_the_ranks_is_allowed():
    loader = DataLoader(Numbers(3), batch_size=1)
    assert [share is None for share in evaluation_shares(loader, 1, 2)] == [True, True, True]


@pytest.mark.parametrize("drop_last", [False, True])
def test_drop_last_of_the_loader_is_kept(drop_last):
    loader = DataLoader(Numbers(5), batch_size=2, drop_last=drop_last)
    assert len(list(evaluation_shares(loader, 0, 2))) == 3 - drop_last


def test_workers_give_the_same_shares():
    plain = [share.tolist() for share in evaluation_shares(DataLoader(Numbers(9), batch_size=4), 0, 2)]
    loader = DataLoader(Numbers(9), batch_size=4, num_workers=2)
    assert [share.tolist() for share in evaluation_shares(loader, 0, 2)] == plain


def test_a_sharded_stream_is_evaluated_by_its_shards():
    shares = [
        [
            share.tolist()
            for share in evaluation_shares(DataLoader(ShardedStream(r, 2, 3), batch_size=4), r, 2)
        ]
        for r in range(2)
    ]
    assert shares == [[[0, 2], [4]], [[1, 3], [5]]]
