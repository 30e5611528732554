"""Sharded optimizer state in the host's shared arena: squares are taken as the sums pass through the cache,
and one pass steps this rank's parts and writes the new parameters into every rank's arena.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import comm
from mlsys_engine.data_parallel.arenas import BucketMemory
from mlsys_engine.data_parallel.reductions import Reduction, Waitable
from mlsys_engine.data_parallel.sharded import ShardedState, chunk_rows
from mlsys_engine.numerics import GradientScale
from mlsys_engine.plan import Plan


class ArenaShardReduction(Reduction):
    """A Reduction of which each rank keeps its part. The statistics queue behind it."""

    def __init__(
        self,
        plan: Plan,
        terms: Mapping[nn.Parameter, int],
        buckets: Sequence[BucketMemory],
        norm_terms: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        self._partition, self._norm_terms, self._group = plan.partition, norm_terms, group
        rank = dist.get_rank(group)
        self._chunks = [
            torch.tensor(chunk_rows(bucket, terms, bounds[rank], bounds[rank + 1]), dtype=torch.int64).view(
                -1, 3
            )
            for bucket, bounds in zip(buckets, plan.partition, strict=True)
        ]

    def __call__(self, bucket: BucketMemory) -> Waitable:
        """Starts the reduction of one bucket: this rank's part becomes the sum, the rest is left alone."""
        work = comm.reduce_shard(
            bucket.gradients,
            self._partition[bucket.index],
            chunks=self._chunks[bucket.index],
            sums=self._norm_terms,
            group=self._group,
            async_op=True,
        )
        assert work is not None
        return work

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every step reduces all of the gradient."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes nothing."""


class ArenaShardUpdate(ShardedState):
    """An Update over this rank's parts, after ArenaShardReduction."""

    def step(self, scale: GradientScale) -> None:
        """Steps and shares parameters in one pass."""
        if not scale.skip:
            self._shard.advance()
            comm.reduce_scatter_optimize_all_gather(
                self._pair.gradients.data,
                self._pair.parameters.data,
                self._partition,
                self._shard.table(),
                grad_scale=float(scale.scale),
                is_reduced=True,
                group=self._group,
            )
            torch.autograd.graph.increment_version(self._shard.parameters)
        self._end_step()
