"""Which gradients travel together: the bucket layout of a model, made from its trace without any rank."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from mlsys_engine.plan import Bucket, BucketSlot
from mlsys_engine.trace import Trace

MIB = 1 << 20
FIRST_BUCKET_MIB = 1.0  # small, so that the first reduction starts soon after backward does


@dataclass
class _Open:
    limit: float
    slots: list[BucketSlot] = field(default_factory=list)
    num_bytes: int = 0
    last: int = 0  # position of its last parameter in the order of readiness


def layout_buckets(
    trace: Trace,
    bucket_mib: float,
    first_bucket_mib: float = FIRST_BUCKET_MIB,
    gradients: torch.dtype | None = None,
    names: Collection[str] | None = None,
) -> tuple[Bucket, ...]:
    """Trainable parameters in the reverse order of their first use, cut into buckets of one dtype each.

    The reverse order is that in which backward finishes gradients, so buckets fill, and can be launched, one
    after the other. A bucket is closed before the parameter that would take it over the limit; a parameter
    larger than the limit gets a bucket to itself. A tied parameter appears once, where its first use puts it.
    `gradients` is the type of all gradients where it is not that of their parameters, and `names` has the
    parameters to lay out where not all are.
    """
    first = min(first_bucket_mib, bucket_mib) * MIB
    open_by_dtype: dict[str, _Open] = {}
    closed: list[tuple[int, Bucket]] = []
    trainable = [
        parameter
        for parameter in trace.parameters_in_order()
        if parameter.requires_grad and (names is None or parameter.fqn in names)
    ]
    for position, parameter in enumerate(reversed(trainable)):
        kind = gradients or parameter.dtype
        dtype, num_bytes = _name(kind), math.prod(parameter.shape) * kind.itemsize
        current = open_by_dtype.setdefault(dtype, _Open(limit=first))
        if current.slots and current.num_bytes + num_bytes > current.limit:
            closed.append((current.last, Bucket(dtype=dtype, slots=tuple(current.slots))))
            current = open_by_dtype[dtype] = _Open(limit=bucket_mib * MIB)
        current.slots.append(BucketSlot(name=parameter.fqn, shape=parameter.shape))
        current.num_bytes += num_bytes
        current.last = position
    closed += [(bucket.last, Bucket(dtype=dtype, slots=tuple(bucket.slots)))
               for dtype, bucket in open_by_dtype.items()]  # fmt: skip
    return tuple(bucket for _, bucket in sorted(closed, key=lambda item: item[0]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
