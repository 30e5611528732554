"""Lets torch's DDP and FSDP2 put their buckets into the shared arena without being asked.

Both can allocate through the backend and do not by default: DDP looks at an environment variable, FSDP2 at a
method of each wrapped module. What the user has set wins in both.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from mlsys_engine.comm.groups import is_native

DDP_VARIABLE = "DDP_DISABLE_COMM_MEM"


def put_buckets_into_the_arena() -> None:
    """Called when a group is created. Idempotent; parameters sharded over other backends are left alone."""
    os.environ.setdefault(DDP_VARIABLE, "0")
    if not hasattr(FSDPParamGroup.__init__, "__wrapped__"):
        initialise = _allocating_from_native_groups(FSDPParamGroup.__init__)
        FSDPParamGroup.__init__ = initialise  # type: ignore[method-assign]


def _allocating_from_native_groups(initialise: Any) -> Any:
    """FSDPParamGroup's initialiser, followed by what set_allocate_memory_from_process_group_for_comm does."""

    @functools.wraps(initialise)
    def initialise_in_arena(self: FSDPParamGroup, *args: Any, **keywords: Any) -> None:
        initialise(self, *args, **keywords)
        # Modules that are replicated and not sharded are parameter groups too, and gather nothing.
        if isinstance(self.mesh_info, FSDPMeshInfo) and _all_native(
            self.mesh_info, self.post_forward_mesh_info
        ):
            self.set_allocate_memory_from_process_group(True)

    return initialise_in_arena


def _all_native(*infos: FSDPMeshInfo | None) -> bool:
    given = [info for info in infos if info is not None]
    return all(info.mesh.device_type == "cpu" and is_native(info.shard_process_group) for info in given)
