"""Sharded optimizer state in a device's own memory: bucket by bucket, in the order of the device's streams.

Nothing here waits for the device. A bucket's reduction goes as soon as backward has finished it, and its
squares follow on a stream beside backward's. In the step, the new parameters of one bucket travel while the
next one is stepped. A skipped step is one that the kernels leave out, so what travels then is what all have.
CPU tensors take the same path, where calls happen one after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import comm
from mlsys_engine.data_parallel.arenas import BucketMemory, ModelArenas
from mlsys_engine.data_parallel.reductions import Reduction, Waitable
from mlsys_engine.data_parallel.sharded import ShardedState, chunk_rows
from mlsys_engine.numerics import GradientScale
from mlsys_engine.optim import NativeOptimizer
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS
from mlsys_engine.optim.norms import squares_of_chunks
from mlsys_engine.optim.operands import DeviceLaunch, SentTable
from mlsys_engine.plan import Plan


class DeviceShardReduction(Reduction):
    """A Reduction of which each rank keeps its part, by the reduce-scatter of the device's backend."""

    def __init__(
        self,
        plan: Plan,
        terms: Mapping[nn.Parameter, int],
        buckets: Sequence[BucketMemory],
        norm_terms: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        self._partition, self._group = plan.partition, group
        self._side = _SideStream(norm_terms.device)
        rank = dist.get_rank(group)
        self._squares = [
            _Squares(bucket, terms, bounds[rank : rank + 2], norm_terms)
            for bucket, bounds in zip(buckets, plan.partition, strict=True)
        ]

    def __call__(self, bucket: BucketMemory) -> Waitable:
        """Starts the reduction of one bucket and, behind it, the squares of this rank's part."""
        work = comm.reduce_shard(
            bucket.gradients, self._partition[bucket.index], group=self._group, async_op=True
        )
        assert work is not None
        with self._side.running():
            work.wait()
            self._squares[bucket.index].take()
        return self._side

    def finish(self) -> None:
        """The present stream waits for the squares, which the statistics are to carry."""
        self._side.wait()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every step reduces all of the gradient."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes nothing."""


class DeviceShardUpdate(ShardedState):
    """An Update over this rank's parts, after DeviceShardReduction."""

    def __init__(
        self,
        plan: Plan,
        optimizer: NativeOptimizer,
        arenas: ModelArenas,
        norm_terms: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        super().__init__(plan, optimizer, arenas, norm_terms, group)
        self._buckets, self._bounds = arenas.buckets, plan.partition
        self._launch = DeviceLaunch(optimizer, norm_terms.device)
        self._tables = [SentTable(norm_terms.device) for _ in arenas.buckets]

    def step(self, scale: GradientScale) -> None:
        """Steps bucket by bucket; each one's all-gather starts behind its step, beside the next one's."""
        self._launch.prepare(self._optimizer, scale.scale, scale.skip)
        self._shard.advance(self._launch.num_counted)
        works = []
        for bucket, bounds, table in zip(self._buckets, self._bounds, self._tables, strict=True):
            table.send(self._shard.segments(bucket.index))
            self._launch(table, self._shard.steps)
            works.append(comm.share_shards(bucket.parameters, bounds, group=self._group, async_op=True))
        for work in works:
            assert work is not None
            work.wait()  # on a device its stream waits: all that comes behind sees the new parameters
        torch.autograd.graph.increment_version(self._shard.parameters)
        self._end_step()


class _Squares:
    """The squares of one rank's part of a bucket, taken into the terms of the norm."""

    def __init__(
        self,
        bucket: BucketMemory,
        terms: Mapping[nn.Parameter, int],
        bounds: Sequence[int],
        norm_terms: torch.Tensor,
    ) -> None:
        first, end = bounds
        rows = chunk_rows(bucket, terms, first, end)
        self._gradients, self._norm_terms = bucket.gradients, norm_terms
        self._spans = _spans(rows, bucket.gradients)
        self._places = torch.tensor([term for *_, term in rows], dtype=torch.int64, device=norm_terms.device)
        self._own = torch.zeros(len(rows), dtype=torch.float64, device=norm_terms.device)

    def take(self) -> None:
        squares_of_chunks(self._spans, self._own)
        self._norm_terms.index_copy_(0, self._places, self._own)


def _spans(rows: Sequence[tuple[int, int, int]], gradients: torch.Tensor) -> torch.Tensor:
    """The rows' memory for `squares_of_chunks`, neighbours as one: it cuts them as the rows are."""
    spans: list[list[int]] = []
    for first, count, _ in rows:
        address = gradients.data_ptr() + first * gradients.element_size()
        if spans and _ends_at(spans[-1], address, gradients.element_size()):
            spans[-1][1] += count
        else:
            spans.append([address, count])
    return torch.tensor(spans, dtype=torch.int64).view(-1, 2)


def _ends_at(span: Sequence[int], address: int, item_bytes: int) -> bool:
    start, count = span
    return count % CHUNK_ELEMENTS == 0 and start + count * item_bytes == address


class _SideStream:
    """A stream beside the one in use. The CPU has none: there everything runs at once, in the caller."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """What is issued inside runs beside the caller's stream, behind what it waits for itself."""
        return torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()

    def wait(self) -> None:
        """The caller's stream waits for all that runs beside it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
