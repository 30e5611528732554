"""Tensors in memory that the other ranks of the host can map, so that collectives on them need no copy."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mlsys_engine.comm.groups import native_group
from mlsys_engine.errors import ConfigError


def empty(
    numel: int, dtype: torch.dtype = torch.float32, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """A zero-filled 1-d CPU tensor of `numel` elements in the shared arena of `group` (default: the job's).

    Works in a world of one too. When the arena's limit is reached the memory is private and a warning
    says so.
    """
    if numel < 0:
        raise ConfigError(
            f"empty({numel}) was called.", "The number of elements cannot be negative.", "Pass 0 or more."
        )
    tensor: torch.Tensor = native_group(group).allocate_tensor(numel, dtype=dtype, device=torch.device("cpu"))
    return tensor


def in_arena(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> bool:
    """Whether all of the tensor's memory lies in the shared arena of `group`."""
    return bool(native_group(group).in_arena(tensor.data_ptr(), tensor.numel() * tensor.element_size()))
