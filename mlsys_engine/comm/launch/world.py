"""The World: what a rank knows about the job that it has joined."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class World:
    """One rank's place in the job, as `mls.init()` found it; never changes afterwards."""

    rank: int
    """Of this process in the job, 0 <= rank < world_size."""
    local_rank: int
    """Of this process among those on its host."""
    world_size: int
    """Number of processes in the job."""
    local_size: int
    """Number of processes on this host."""
    hosts: tuple[str, ...]
    """The host name of each rank, in rank order."""
    device: torch.device
    """Where this rank computes: the CPU, or with MLSYS_DEVICE=cuda the GPU of its local rank."""
    launcher: str
    """Who started the process: torchrun, openmpi, mpich, slurm, local, env (variables by hand) or single."""
    num_threads: int
    """Intra-operator threads of this rank, the same under every launcher."""
    affinity: tuple[int, ...]
    """The CPUs that this rank may use."""
    backend: str
    """The backend of the default process group."""

    @property
    def num_hosts(self) -> int:
        """Number of different hosts in the job."""
        return len(set(self.hosts))
