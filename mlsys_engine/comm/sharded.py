"""The sharded updates: each rank reduces the part that it owns, steps it, and gives the result to all.

A partition is a flat sequence of rows of world_size + 1 ascending element offsets, equal on all ranks: rank r
owns [row[r], row[r + 1]) of each row. Inside one host, with tensors of `mls.comm.empty`, every operation is
one pass over memory; elsewhere it is composed of reduce-scatter and all-gather. `reduce_shard` (without
chunks) and `share_shards` take CUDA tensors too, where NCCL does the same in place and in stream order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from mlsys_engine.comm.groups import native_group

Group = dist.ProcessGroup | None


@dataclass(frozen=True, kw_only=True)
class RuleTable:
    """An optimizer's rule and the segments it steps; mlsys_engine.optim makes it.

    The addresses in `segments` are followed natively: `keep_alive` holds the tensors behind them.
    """

    rule: str  # a name of mlsys_engine.optim's registry
    segments: (
        Tensor  # int64 [n, 8], csrc/optim/segment.h, sorted by parameter; the gradients' column is not read
    )
    hyper: Tensor  # float64 [groups, 8]
    steps: Tensor  # float32, already advanced for this step
    keep_alive: tuple[Tensor, ...] = ()


def reduce_shard(
    data: Tensor,
    partition: Sequence[int],
    *,
    chunks: Tensor | None = None,
    sums: Tensor | None = None,
    group: Group = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Sums over ranks what this rank owns of `data` (1-d float32), in place; the rest stays its contribution.

    With `chunks`, int64 rows of (first element, number of elements, place) in ascending order, the sum of
    squares of each reduced chunk goes to its place in `sums` (float64), while the chunk is in the cache.
    """
    work = native_group(group).reduce_shard(data, partition, chunks, sums, async_op)
    return _finished(work, async_op)


def reduce_scatter_optimize_all_gather(
    gradients: Tensor,
    parameters: Tensor,
    partition: Sequence[int],
    table: RuleTable,
    *,
    grad_scale: float = 1.0,
    is_reduced: bool = False,
    group: Group = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Sums what this rank owns of `gradients`, steps it by the table's rule, writes all ranks' parameters.

    1-d float32 tensors of one layout. The sum is multiplied by `grad_scale` as it is read and is never
    stored; with `is_reduced`, reduce_shard has stored it before (a clipped step needs the norm first, and
    reading one shard again costs less than reading all ranks' gradients again).

    When a rank dies on the way, the others raise PeerFailedError and their parameters are partly of the old
    and partly of the new step: go on from a checkpoint.
    """
    work = native_group(group).reduce_scatter_optimize_all_gather(
        gradients,
        parameters,
        partition,
        is_reduced,
        table.rule,
        table.segments,
        table.hyper,
        table.steps,
        grad_scale,
        async_op,
    )
    return _finished(work, async_op)


def share_shards(
    data: Tensor, partition: Sequence[int], *, group: Group = None, async_op: bool = False
) -> dist.Work | None:
    """Gives every rank what each owns of its `data` (1-d float32): an in-place all-gather of uneven parts."""
    return _finished(native_group(group).share_shards(data, partition, async_op), async_op)


def _finished(work: dist.Work, async_op: bool) -> dist.Work | None:
    if async_op:
        return work
    work.wait()
    return None
