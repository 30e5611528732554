"""Reductions in the order of one tree over the ranks, whichever hosts they are on."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mlsys_engine.comm.groups import native_group


def all_reduce_tree(
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Reduces `tensor` over all ranks in place, with bits that do not depend on the layout of hosts.

    Ranks are combined as a binary tree in rank order: the largest power of two of them that is smaller than
    their number, then the rest, each part likewise. Together with TreeSum over each rank's own terms the bits
    do not depend on the number of ranks either. Inside one host this is the order of all_reduce; between
    hosts it sends as much as all_reduce where every host holds an aligned run of 2**k ranks, else more.
    """
    return _finished(native_group(group).all_reduce_tree(tensor, op, async_op), async_op)


def reduce_scatter_tree(
    output: torch.Tensor,
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Like reduce_scatter, in the order of all_reduce_tree: rank r gets the r-th equal part in `output`."""
    return _finished(native_group(group).reduce_scatter_tree(output, tensor, op, async_op), async_op)


def _finished(work: dist.Work, async_op: bool) -> dist.Work | None:
    if async_op:
        return work
    work.wait()
    return None
