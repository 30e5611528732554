"""The cut of an epoch into batches, shares and microbatches: each sample exactly once, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.data.layout import BatchLayout, share
from mlsys_engine.errors import DataError


@given(start=st.integers(0, 50), size=st.integers(0, 200), num_shares=st.integers(1, 40))
def test_shares_of_a_span_are_the_span_and_differ_by_at_most_one(start, size, num_shares):
    span = range(start, start + size)
    shares = [share(span, index, num_shares) for index in range(num_shares)]
    assert [position for piece in shares for position in piece] == list(span)
    sizes = [len(piece) for piece in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@st.composite
def layouts(draw):
    """All ranks' layouts of one epoch."""
    num_data_shards = draw(st.integers(1, 6))
    global_batch_size = draw(st.integers(num_data_shards, 20))
    largest_share = -(-global_batch_size // num_data_shards)
    common = {
        "num_samples": draw(st.integers(1, 100)),
        "global_batch_size": global_batch_size,
        "num_data_shards": num_data_shards,
        "accumulate": draw(st.integers(1, largest_share)),
    }
    return [BatchLayout(data_rank=rank, **common) for rank in range(num_data_shards)]


@given(layouts(), st.integers(0, 100))
def test_microbatches_of_all_ranks_are_each_batch_in_order(ranks, start):
    start = min(start, ranks[0].num_samples)
    seen = []
    for batch in ranks[0].batches_from(start):
        assert len(batch) <= ranks[0].global_batch_size
        for layout in ranks:
            pieces = layout.microbatches(batch)
            assert len(pieces) <= layout.accumulate
            assert all(len(piece) for piece in pieces)
            seen += [position for piece in pieces for position in piece]
    assert seen == list(range(start, ranks[0].num_samples))


@given(layouts())
def test_the_number_of_batches_is_what_iterating_gives(ranks):
    for layout in ranks:
        assert len(list(layout.batches_from(0))) == layout.num_batches
        assert layout.per_rank_batch_size == len(layout.rank_share(range(layout.global_batch_size)))


def test_a_last_batch_smaller_than_the_ranks_leaves_ranks_without_a_microbatch():
    common = {"num_samples": 9, "global_batch_size": 8, "num_data_shards": 4, "accumulate": 2}
    ranks = [BatchLayout(data_rank=rank, **common) for rank in range(4)]
    assert [rank.microbatches(range(8, 9)) for rank in ranks] == [[range(8, 9)], [], [], []]


def test_a_share_smaller_than_accumulate_gives_fewer_microbatches():
    layout = BatchLayout(num_samples=5, global_batch_size=5, num_data_shards=3, data_rank=2, accumulate=2)
    assert layout.microbatches(range(5)) == [range(4, 5)]


def test_drop_last_leaves_out_only_a_batch_that_is_not_full():
    layout = BatchLayout(num_samples=10, global_batch_size=4, num_data_shards=1, data_rank=0, drop_last=True)
    assert list(layout.batches_from(0)) == [range(4), range(4, 8)]
    assert list(layout.batches_from(6)) == [range(6, 10)]
    assert list(layout.batches_from(7)) == []
    assert layout.num_batches == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_rank": 2}, "data_rank=2"),
        ({"data_rank": -1}, "data_rank=-1"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": 5}, "between 1 and 4"),
        ({"num_samples": 7, "drop_last": True}, "do not fill"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_way_out(changes, words):
    settings = {"num_samples": 9, "global_batch_size": 8, "num_data_shards": 2, "data_rank": 0} | changes
    with pytest.raises(DataError, match=words) as caught:
        BatchLayout(**settings)
    assert caught.value.action
