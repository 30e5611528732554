"""Streams: only those that say how they are sharded, and then as exactly as any dataset."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from torch.utils.data import DataLoader

from mlsys_engine.data import GlobalBatches
from mlsys_engine.errors import DataError
from tests.data.datasets import ShardedStream, Stream


def batches_of(
    stream: Any, batch_size: int, rank: int = 0, shards: int = 1, **settings: Any
) -> GlobalBatches:
    loader_settings = {name: settings.pop(name) for name in ("num_workers",) if name in settings}
    loader = DataLoader(stream, batch_size=batch_size, **loader_settings)
    return GlobalBatches(loader, data_rank=rank, num_data_shards=shards, **settings)


def taken(turns: Any) -> list[list[list[int]]]:
    return [[microbatch.tolist() for microbatch in share] for share in turns]


@pytest.mark.parametrize("shards", [1, 2])
def test_a_stream_that_does_not_say_that_it_is_sharded_is_refused(shards):
    with pytest.raises(DataError, match=r"Stream is an IterableDataset.*samples_per_shard"):
        batches_of(Stream(), 4, 0, shards)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_rank_takes_its_share_from_its_own_stream(num_workers):
    ranks = [
        taken(batches_of(ShardedStream(r, 2, 5), 4, r, 2, accumulate=2, num_workers=num_workers))
        for r in (0, 1)
    ]
    assert ranks == [[[[0], [2]], [[4], [6]], [[8]]], [[[1], [3]], [[5], [7]], [[9]]]]


@pytest.mark.parametrize("num_received", range(6))
def test_a_stream_resumes_after_every_batch(num_received):
    expected = taken(
        itertools.chain.from_iterable(itertools.repeat(batches_of(ShardedStream(0, 1, 5), 2), 2))
    )
    stopped = batches_of(ShardedStream(0, 1, 5), 2)
    received = taken(itertools.islice(itertools.chain(stopped, stopped), num_received))
    resumed = batches_of(ShardedStream(0, 1, 5), 2)
    resumed.load_state_dict(stopped.state_dict())
    while resumed.epoch < 2:
        received += taken(resumed)
    assert received == expected
    assert expected[3] == [[100, 101]]


def test_a_stream_cannot_continue_on_another_number_of_ranks():
    state = batches_of(ShardedStream(0, 1, 4), 4).state_dict()
    with pytest.raises(DataError, match="read 1 streams, this one reads 2"):
        batches_of(ShardedStream(0, 2, 2), 4, 0, 2).load_state_dict(state)


def test_a_stream_that_ends_early_is_named():
    batches = batches_of(ShardedStream(1, 2, declared=3, given=2), 4, 1, 2)
    with pytest.raises(DataError, match=r"data rank 1 ended before its samples_per_shard=3"):
        list(batches)


def test_streams_need_equal_shares():
    with pytest.raises(DataError, match="multiple of 2"):
        batches_of(ShardedStream(0, 2, 3), 3, 0, 2)


def test_a_stream_with_several_workers_is_refused():
    with pytest.raises(DataError, match="num_workers=2"):
        batches_of(ShardedStream(0, 1, 3), 2, num_workers=2)


@pytest.mark.parametrize("declared", [0, -1, True, "3"])
def test_a_declaration_that_is_not_a_positive_count_is_refused(declared):
    stream = ShardedStream(0, 1, 3)
    stream.samples_per_shard = declared
    with pytest.raises(DataError, match="samples_per_shard"):
        batches_of(stream, 2)
