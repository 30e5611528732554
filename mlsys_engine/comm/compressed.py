"""An all-reduce that encodes what travels between hosts, with error feedback."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mlsys_engine.comm.groups import native_group
from mlsys_engine.errors import ConfigError

COMPRESSIONS = ("bf16", "int8")


def all_reduce_compressed(
    tensor: torch.Tensor,
    compression: str,
    residual: torch.Tensor | None = None,
    *,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Sums (or averages) a float32 `tensor` over all ranks in place, sending fewer bytes between hosts.

    "bf16" sends 2 bytes an element, "int8" 1.02: signed bytes in blocks of 256 with one float32 scale. Inside
    a host nothing is encoded, so on one host this is all_reduce. Each host's contribution is rounded once and
    the result once, and all ranks get the same bits; inf and nan arrive as such.

    `residual` is this rank's error feedback: float32 zeros of the tensor's size at first, then the same
    tensor at every call. What rounding loses is kept there and sent the next time. The sum of all ranks'
    residuals is what has not been delivered yet. Without one, what is lost is lost.
    """
    if op not in {dist.ReduceOp.SUM, dist.ReduceOp.AVG}:
        raise ConfigError(
            f"all_reduce_compressed was given op {op}.", "It sums or averages.", "Use all_reduce for others."
        )
    average = op == dist.ReduceOp.AVG
    work: dist.Work = native_group(group).all_reduce_compressed(
        tensor, compression, residual, average, async_op
    )
    if async_op:
        return work
    work.wait()
    return None


def num_hosts(group: dist.ProcessGroup | None = None) -> int:
    """How many sets of ranks that share memory the group has; 0 before it has connected."""
    return int(native_group(group).num_hosts())
