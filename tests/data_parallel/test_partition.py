from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.data_parallel.arenas import ModelArenas
from mlsys_engine.data_parallel.partition import bucket_extent, partition_bucket
from mlsys_engine.memory.flat_arena import layout_slots
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS
from mlsys_engine.plan import Bucket, BucketSlot, Plan
from mlsys_engine.strategies import DataParallel, plan
from tests.data_parallel.models import mlp


def _bucket(sizes):
    slots = tuple(BucketSlot(name=str(index), shape=(size,)) for index, size in enumerate(sizes))
    return Bucket(dtype="float32", slots=slots)


@given(sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=8), world_size=st.integers(1, 9))
def test_cuts_ascend_and_lie_where_chunks_begin_and_near_equal_shares(sizes, world_size):
    bucket = _bucket(sizes)
    bounds = partition_bucket(bucket, world_size)
    total = bucket_extent(bucket)
    assert len(bounds) == world_size + 1 and bounds[0] == 0 and bounds[-1] == total
    assert list(bounds) == sorted(bounds)
    slots = layout_slots([(slot.name, slot.shape) for slot in bucket.slots], torch.float32)
    begins = {start for slot in slots for start in range(slot.offset, slot.end, CHUNK_ELEMENTS)}
    assert all(bound in begins for bound in bounds[1:-1] if bound not in (0, total))
    # Chunks with their padding are at most 4,096 + 15 elements long, and a cut goes to the nearer end of one.
    assert all(
        abs(bound - total * rank / world_size) <= (CHUNK_ELEMENTS + 15) / 2 + 1
        for rank, bound in enumerate(bounds)
    )


def test_a_bucket_is_as_long_as_its_range_of_the_arena():
    model = mlp(width=7)
    buckets = plan(model, DataParallel(bucket_mib=0.0002)).buckets
    arenas = ModelArenas(buckets, dict(model.named_parameters()))
    assert [memory.gradients.numel() for memory in arenas.buckets] == [bucket_extent(b) for b in buckets]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_plan_says_who_owns_what_and_comes_back_from_json(world_size):
    sharded = plan(mlp(width=100), DataParallel(shard="optimizer", bucket_mib=0.02), world=world_size)
    assert len(sharded.partition) == len(sharded.buckets)
    assert all(len(bounds) == world_size + 1 for bounds in sharded.partition)
    assert Plan.from_json(sharded.to_json()) == sharded
    assert dict(sharded.algorithms)["gradients"] == "reduce_scatter"
    assert "shard optimizer" in str(sharded)
    whole = plan(mlp(width=100), DataParallel(bucket_mib=0.02), world=world_size)
    assert whole.hash != sharded.hash and whole.partition == ()
