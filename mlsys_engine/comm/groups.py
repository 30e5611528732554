"""Finds the native group behind a torch process group."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

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


def job_group() -> Any:
    """The native object of the job's own group; None when there is none (yet)."""
    return _native(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None


def is_native(group: dist.ProcessGroup) -> bool:
    """Whether this rank's CPU tensors travel through the native backend in `group`."""
    return _native(group) is not None


def direct_group(group: dist.ProcessGroup | None = None) -> Any:
    """The native object of `group` for calls that pass torch by; None when torch must see the call.

    That is when torch checks the calls (TORCH_DISTRIBUTED_DEBUG=DETAIL) or collects them (inside a coalescing
    manager). Raises as `native_group` does.
    """
    torch_group = _world.default_pg if group is None else group
    known = _KNOWN.get(id(torch_group))
    if known is None or known[0]() is not torch_group:
        known = _remember(torch_group, native_group(group))
    return None if _world.pg_coalesce_state else known[1]


# By id, since looking up a weak dictionary costs as much as a small operation; an id that a later group
# inherits is told apart by the reference. Torch's groups hold their backends, not the other way round, so an
# entry goes when torch and the caller have let go of the group.
_KNOWN: dict[int, tuple[weakref.ref[Any], Any]] = {}


def _remember(torch_group: Any, native: Any) -> tuple[weakref.ref[Any], Any]:
    key = id(torch_group)
    reference = weakref.ref(torch_group, lambda gone: _forget(key, gone))
    wrapped = torch_group._get_backend(torch.device("cpu")) is not native
    known = _KNOWN[key] = (reference, None if wrapped else native)
    return known


def _forget(key: int, reference: weakref.ref[Any]) -> None:
    if key in _KNOWN and _KNOWN[key][0] is reference:
        del _KNOWN[key]


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
