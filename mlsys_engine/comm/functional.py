"""The collectives as functions, on a group that is checked to be native.

All take `group` (default: the job's) and return None, or with `async_op` the Work to wait for.
Roots, sources and destinations are global ranks, as in torch.distributed.

A call that waits goes straight to the native group (`all_reduce_now` and its like), which saves more than the
operation itself takes when it is small. The native group declines what is not a plain call on plain tensors;
that, and what is asynchronous, takes torch.distributed's road, with its checks and in its words.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys_engine.comm.groups import direct_group, native_group

Group = dist.ProcessGroup | None
Work = dist.Work | None
Reduction = dist.ReduceOp | dist.ReduceOp.RedOpType


# torch 2.13 renamed both and warns at the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(
    tensor: Tensor, op: Reduction = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
) -> Work:
    """Reduces `tensor` over all ranks, in place."""
    if not async_op and (native := direct_group(group)) and native.all_reduce_now(tensor, op):
        return None
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
    if not async_op and (native := direct_group(group)) and native.reduce_now(tensor, dst, op):
        return None
    native_group(group)
    return dist.reduce(tensor, dst, op=op, group=group, async_op=async_op)


def all_gather(output: Tensor, tensor: Tensor, group: Group = None, async_op: bool = False) -> Work:
    """Fills `output` with every rank's `tensor` in rank order; `output` has world_size times its elements."""
    if not async_op and (native := direct_group(group)) and native.all_gather_now(output, tensor):
        return None
    native_group(group)
    return _all_gather_single(output, tensor, group=group, async_op=async_op)


def reduce_scatter(
    output: Tensor,
    tensor: Tensor,
    op: Reduction = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
) -> Work:
    """Reduces `tensor` over all ranks; rank r gets the r-th of its world_size equal parts in `output`."""
    if not async_op and (native := direct_group(group)) and native.reduce_scatter_now(output, tensor, op):
        return None
    native_group(group)
    return _reduce_scatter_single(output, tensor, op=op, group=group, async_op=async_op)


def broadcast(tensor: Tensor, src: int = 0, group: Group = None, async_op: bool = False) -> Work:
    """Copies rank `src`'s `tensor` into all others'."""
    if not async_op and (native := direct_group(group)) and native.broadcast_now(tensor, src):
        return None
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
    if not async_op and (native := direct_group(group)) and native.gather_now(tensor, outputs or (), dst):
        return None
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
    if not async_op and (native := direct_group(group)) and native.scatter_now(tensor, inputs or (), src):
        return None
    native_group(group)
    return dist.scatter(tensor, None if inputs is None else list(inputs), src, group=group, async_op=async_op)


def all_to_all(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], group: Group = None, async_op: bool = False
) -> Work:
    """Sends `inputs[r]` to rank r and receives `outputs[r]` from it; sizes may differ from pair to pair."""
    if not async_op and (native := direct_group(group)) and native.all_to_all_now(outputs, inputs):
        return None
    native_group(group)
    return dist.all_to_all(list(outputs), list(inputs), group=group, async_op=async_op)


def send(tensor: Tensor, dst: int, group: Group = None, tag: int = 0, async_op: bool = False) -> Work:
    """Sends `tensor` to rank `dst`. Without `async_op` waits until the buffer may be used again."""
    if not async_op and (native := direct_group(group)) and native.send_now(tensor, dst, tag):
        return None
    native_group(group)
    if async_op:
        return dist.isend(tensor, dst, group=group, tag=tag)
    dist.send(tensor, dst, group=group, tag=tag)
    return None


def recv(
    tensor: Tensor, src: int | None = None, group: Group = None, tag: int = 0, async_op: bool = False
) -> int | Work:
    """Receives from rank `src`, or from anyone; returns the sender's rank, or with `async_op` the Work."""
    if not async_op and (native := direct_group(group)):
        sender: int | None = native.recv_now(tensor, src, tag)
        if sender is not None:
            return sender
    native_group(group)
    if async_op:
        return dist.irecv(tensor, src, group=group, tag=tag)
    return dist.recv(tensor, src, group=group, tag=tag)


def barrier(group: Group = None, timeout_s: float | None = None) -> None:
    """Returns when every rank has called it; `timeout_s` replaces the group's timeout for this one call."""
    if (native := direct_group(group)) and native.barrier_now(0.0 if timeout_s is None else timeout_s):
        return
    backend = native_group(group)
    if timeout_s is None:
        dist.barrier(group=group)
        return
    options = dist.BarrierOptions()
    options.device = torch.device("cpu")
    options.timeout = datetime.timedelta(seconds=timeout_s)
    options.asyncOp = False
    backend.barrier(options).wait()
