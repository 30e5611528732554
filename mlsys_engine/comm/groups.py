"""Finds the native group behind a torch process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine.errors import ConfigError


def native_group(group: dist.ProcessGroup | None = None) -> Any:
    """The native object of `group` (default: the job's). Raises ConfigError when there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            "No process group is initialised.",
            "The functions of mlsys_engine.comm work on a group of backend mlsys, of any size, also one.",
            'Call mls.init() first, or torch.distributed.init_process_group("mlsys").',
        )
    found = _native(group if group is not None else dist.group.WORLD)
    if found is None:
        raise ConfigError(
            f"The process group has backend {dist.get_backend(group)!r}.",
            "The functions of mlsys_engine.comm work on groups of backend mlsys.",
            'Call mls.init(), or create the group with backend="mlsys".',
        )
    return found


def is_native(group: dist.ProcessGroup) -> bool:
    """Whether this rank's CPU tensors travel through the native backend in `group`."""
    return _native(group) is not None


def live_groups() -> Iterator[Any]:
    """Every native group that this rank belongs to, the default one first."""
    if dist.is_available() and dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            found = _native(group)
            if found is not None:
                yield found


def _native(group: Any) -> Any:
    if not isinstance(group, dist.ProcessGroup):
        return None
    try:
        backend = group._get_backend(torch.device("cpu"))
    except RuntimeError:  # a group without a backend for CPU tensors
        return None
    # TORCH_DISTRIBUTED_DEBUG=DETAIL puts a checking wrapper around the backend.
    backend = getattr(backend, "wrapped_pg", backend)
    return backend if hasattr(backend, "describe_transports") else None
