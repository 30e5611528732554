"""Lets torch's DDP and FSDP2 put their buckets into the shared arena without being asked.

Both can allocate through the backend and do not by default: DDP looks at an environment variable, FSDP2 at a
method of each wrapped module. What the user has set wins in both.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mlsys_engine.comm.groups import is_native

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

DDP_VARIABLE = "DDP_DISABLE_COMM_MEM"
_PARAMETER_GROUPS = "torch.distributed.fsdp._fully_shard._fsdp_param_group"


def put_buckets_into_the_arena() -> None:
    """Called when a group is created. Idempotent; parameters sharded over other backends are left alone.

    FSDP2 takes 0.6 s to import: where nobody has yet, its turn comes when somebody does.
    """
    os.environ.setdefault(DDP_VARIABLE, "0")
    if _PARAMETER_GROUPS in sys.modules:
        _let_parameter_groups_allocate(sys.modules[_PARAMETER_GROUPS])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported(importlib.abc.MetaPathFinder):
    """Waits for the import of FSDP2's parameter groups, and is gone after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PARAMETER_GROUPS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_adapt(module: ModuleType) -> None:
                execute(module)
                _let_parameter_groups_allocate(module)

            spec.loader.exec_module = execute_and_adapt  # type: ignore[method-assign]
        return spec


def _let_parameter_groups_allocate(module: ModuleType) -> None:
    groups = module.FSDPParamGroup
    if not hasattr(groups.__init__, "__wrapped__"):
        groups.__init__ = _allocating_from_native_groups(groups.__init__)


def _allocating_from_native_groups(initialise: Any) -> Any:
    """FSDPParamGroup's initialiser, followed by what set_allocate_memory_from_process_group_for_comm does."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo  # by now it is imported

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
