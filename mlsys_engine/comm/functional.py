"""The collectives as functions. Thin: torch.distributed's own, on a group that is checked to be native.

All take `group` (default: the job's) and return None, or with `async_op` the Work to wait for.
Roots, sources and destinations are global ranks, as in torch.distributed.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys_engine.comm.groups import native_group

Group = dist.ProcessGroup | None
Work = dist.Work | None
Reduction = dist.ReduceOp | dist.ReduceOp.RedOpType


def all_reduce(
    tensor: Tensor, op: Reduction = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
) -> Work:
    """Reduces `tensor` over all ranks, in place."""
    native_group(group)
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def reduce(
    tensor: Tensor,
    dst: int = 0,
    op: Reduction = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
) -> Work:
    """Reduces `tensor` over all ranks into rank `dst`'s; the others' stay as they are."""
    native_group(group)
    return dist.reduce(tensor, dst, op=op, group=group, async_op=async_op)


def all_gather(output: Tensor, tensor: Tensor, group: Group = None, async_op: bool = False) -> Work:
    """Fills `output` with every rank's `tensor` in rank order; `output` has world_size times its elements."""
    native_group(group)
    return dist.all_gather_into_tensor(output, tensor, group=group, async_op=async_op)


def reduce_scatter(
    output: Tensor,
    tensor: Tensor,
    op: Reduction = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
) -> Work:
    """Reduces `tensor` over all ranks; rank r gets the r-th of its world_size equal parts in `output`."""
    native_group(group)
    return dist.reduce_scatter_tensor(output, tensor, op=op, group=group, async_op=async_op)


def broadcast(tensor: Tensor, src: int = 0, group: Group = None, async_op: bool = False) -> Work:
    """Copies rank `src`'s `tensor` into all others'."""
    native_group(group)
    return dist.broadcast(tensor, src, group=group, async_op=async_op)


def gather(
    tensor: Tensor,
    outputs: Sequence[Tensor] | None = None,
    dst: int = 0,
    group: Group = None,
    async_op: bool = False,
) -> Work:
    """Collects every rank's `tensor` into rank `dst`'s list `outputs`; the others pass None."""
    native_group(group)
    return dist.gather(
        tensor, None if outputs is None else list(outputs), dst, group=group, async_op=async_op
    )


def scatter(
    tensor: Tensor,
    inputs: Sequence[Tensor] | None = None,
    src: int = 0,
    group: Group = None,
    async_op: bool = False,
) -> Work:
    """Gives rank r the r-th of rank `src`'s list `inputs` in its `tensor`; the others pass None."""
    native_group(group)
    return dist.scatter(tensor, None if inputs is None else list(inputs), src, group=group, async_op=async_op)


def all_to_all(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Group = None, async_op: bool = False
) -> Work:
    """Sends `inputs[r]` to rank r and receives `outputs[r]` from it; sizes may differ from pair to pair."""
    native_group(group)
    return dist.all_to_all(list(outputs), list(inputs), group=group, async_op=async_op)


def send(tensor: Tensor, dst: int, group: Group = None, tag: int = 0, async_op: bool = False) -> Work:
    """Sends `tensor` to rank `dst`. Without `async_op` waits until the buffer may be used again."""
    native_group(group)
    if async_op:
        return dist.isend(tensor, dst, group=group, tag=tag)
    dist.send(tensor, dst, group=group, tag=tag)
    return None


def recv(
    tensor: Tensor, src: int | None = None, group: Group = None, tag: int = 0, async_op: bool = False
) -> int | Work:
    """Receives from rank `src`, or from anyone; returns the sender's rank, or with `async_op` the Work."""
    native_group(group)
    if async_op:
        return dist.irecv(tensor, src, group=group, tag=tag)
    return dist.recv(tensor, src, group=group, tag=tag)


def barrier(group: Group = None, timeout_s: float | None = None) -> None:
    """Returns when every rank has called it; `timeout_s` replaces the group's timeout for this one call."""
    backend = native_group(group)
    if timeout_s is None:
        dist.barrier(group=group)
        return
    options = dist.BarrierOptions()
    options.device = torch.device("cpu")
    options.timeout = datetime.timedelta(seconds=timeout_s)
    options.asyncOp = False
    backend.barrier(options).wait()
