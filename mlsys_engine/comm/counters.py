"""What a group's transports have moved, as the transports themselves counted it."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from mlsys_engine.comm.groups import native_group


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Payload bytes that this rank has moved in one group since the group was created, by transport."""

    operations: int
    shm_bytes: int  # read from, or written to, another rank's shared memory
    tcp_bytes_sent: int
    tcp_bytes_received: int
    mpi_bytes_sent: int  # instead of TCP, with MLSYS_TRANSPORT=mpi
    mpi_bytes_received: int
    zero_copy_operations: int  # done in place in the shared arena, without staging
    strangers: int  # connections turned away because they did not prove the job's key


def counters(group: dist.ProcessGroup | None = None) -> Counters:
    """This rank's counters of `group` (default: the job's)."""
    return Counters(**native_group(group).counters())


def describe_transports(group: dist.ProcessGroup | None = None) -> str:
    """One line in words: which ranks share memory with this one, and how the others are reached."""
    return str(native_group(group).describe_transports())
