"""Which elements of a bucket each rank owns when the optimizer's state is sharded.

Every bucket is split, not the whole model, so that all ranks have their share of the work in every bucket. A
cut lies where one of the chunks begins in which the norm is summed: then each rank sums whole chunks, and
their sum over ranks, taken chunk by chunk in the unsharded order, has the unsharded bits.
"""

from __future__ import annotations

from bisect import bisect_left

from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import layout_slots
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS
from mlsys_engine.plan import DTYPES, Bucket


def partition_bucket(bucket: Bucket, world_size: int) -> tuple[int, ...]:
    """world_size + 1 ascending offsets in elements of the bucket: rank r owns [bounds[r], bounds[r + 1]).

    As equal as the chunks allow; ranks beyond a small bucket's chunks own nothing of it.
    """
    if bucket.dtype != "float32":
        raise ConfigError(
            f'DataParallel(shard="optimizer") of a model with {bucket.dtype} parameters, '
            f"such as {bucket.slots[0].name}.",
            "It shards the state of the engine's own optimizers, which step float32 parameters.",
            'Keep the model in float32, or use shard="none" with an optimizer of torch.optim.',
        )
    dtype = DTYPES[bucket.dtype]
    slots = layout_slots([(slot.name, slot.shape) for slot in bucket.slots], dtype)
    begins = [start for slot in slots for start in range(slot.offset, slot.end, CHUNK_ELEMENTS)]
    total = bucket_extent(bucket)
    bounds = [0]
    for rank in range(1, world_size):
        target = total * rank // world_size
        after = bisect_left(begins, target)
        nearby = [*begins[max(after - 1, 0) : after + 1], *([total] if after == len(begins) else [])]
        nearest = min(nearby, key=lambda begin: (abs(begin - target), begin), default=total)
        bounds.append(max(nearest, bounds[-1]))
    return (*bounds, total)


def bucket_extent(bucket: Bucket) -> int:
    """Elements of a bucket in the arena, its padding included."""
    dtype = DTYPES[bucket.dtype]
    # One more slot without elements begins where the bucket ends.
    end = layout_slots([*((slot.name, slot.shape) for slot in bucket.slots), ("", (0,))], dtype)[-1]
    return end.offset
