"""Parameters on a device mesh (DTensor: FSDP2, tensor parallel): their local shards and their norms.

The native step works on each rank's local shard, which is a view; moments are DTensors of the parameter's
mesh and placements around such shards. A tensor is told to be a DTensor by its `to_local`, so that this
module costs no import of torch.distributed.tensor where nobody uses one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.optim import norms
from mlsys_engine.optim.checks import describe
from mlsys_engine.optim.formats import LIKE_PARAMETER, Form
from mlsys_engine.optim.storage import exported

_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor."""
    return type(tensor) not in _PLAIN_TYPES and hasattr(tensor, "to_local")


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of `tensors` is a DTensor. Cheap with thousands of plain ones."""
    return not set(map(type, tensors)) <= _PLAIN_TYPES and any(map(is_sharded, tensors))


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, in the DTensor's memory; a plain tensor is its own. Call it under no_grad."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    wait = getattr(shard, "wait", None)  # a collective of tensor parallelism may still be on its way
    return shard if wait is None else wait()


def first_element(tensor: Any) -> int:
    """Where in the whole tensor this rank's shard begins, in elements; random numbers are counted by it.

    Shards of the first dimension are stretches of the whole, and so draw what it would.
    """
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(offset * stride for offset, stride in zip(offsets, tensor.stride(), strict=True))


def local_gradient(parameter: Tensor, gradient: Tensor, name_of: Callable[[Tensor], str]) -> Tensor:
    """This rank's shard of a gradient, which must be laid out as its parameter."""
    if not is_sharded(parameter) and not is_sharded(gradient):
        return gradient
    if not _same_layout(parameter, gradient):
        raise ConfigError(
            f"The gradient of {name_of(parameter)} is {describe(gradient)}.",
            f"{describe(parameter)} is expected, like the parameter.",
            "Redistribute it before the step: p.grad = p.grad.redistribute(placements=p.placements).",
        )
    return local(gradient)


def like(shard: Tensor, parameter: Tensor) -> Tensor:
    """The DTensor with the parameter's mesh and placements whose local shard is `shard`, in its memory."""
    from torch.distributed.tensor import DTensor  # imported already: `parameter` is one

    mesh: Any = parameter
    return DTensor.from_local(
        shard,
        mesh.device_mesh,
        mesh.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def local_state(
    parameter: Tensor, state: dict[str, Any], moments: Sequence[str], name_of: Callable[[Tensor], str]
) -> dict[str, Any]:
    """A parameter's state with its `moments` as local shards; a whole moment gives its shard."""
    if not is_sharded(parameter) and not any(is_sharded(state.get(key)) for key in moments):
        return state
    shards = {key: _local_moment(parameter, key, state.get(key), name_of) for key in moments}
    return {**state, **{key: shard for key, shard in shards.items() if shard is not None}}


def store_state(
    parameter: Tensor, state: dict[str, Any], moments: Sequence[str], shards: dict[str, Any]
) -> None:
    """Writes what local_state gave, and what was made of it, back to the parameter's own state."""
    if state is shards:
        return
    for key in state.keys() - shards.keys():
        del state[key]
    for key, value in shards.items():
        if key not in moments:
            state[key] = value
        elif not _holds(state.get(key), value):
            state[key] = like(value, parameter)


def exported_state(
    parameter: Tensor,
    state: dict[str, Any],
    form: Form,
    moments: tuple[str, ...],
    name_of: Callable[[Tensor], str],
) -> dict[str, Any]:
    """A parameter's state as storage.exported has it, with DTensors for a DTensor."""
    if not is_sharded(parameter):
        return exported(parameter, state, form, moments)
    shards = local_state(parameter, state, (*moments, *LIKE_PARAMETER), name_of)
    values = exported(local(parameter), shards, form, moments)
    for key in (*moments, *LIKE_PARAMETER):
        if isinstance(value := values.get(key), Tensor):
            values[key] = like(value, parameter)
    return values


# ---- norms


@dataclass(frozen=True)
class ShardLayout:
    """Over which dimensions of which mesh a tensor is cut; replicas are not counted."""

    mesh: Any
    dims: tuple[int, ...]
    device: torch.device


def layout_of(parameter: Any) -> ShardLayout | None:
    """None for tensors that every rank has whole."""
    if not is_sharded(parameter):
        return None
    dims = tuple(
        dim
        for dim, placement in enumerate(parameter.placements)
        if not placement.is_replicate() and parameter.device_mesh.size(dim) > 1
    )
    return ShardLayout(parameter.device_mesh, dims, parameter.device) if dims else None


def sum_of_squares(params: Sequence[Tensor], name_of: Callable[[Tensor], str]) -> Tensor:
    """The sum of squares of all whole gradients, the same bits on all ranks of the parameters' meshes.

    Each rank sums its shards; the sums are gathered over the mesh dimensions that shard and added in the
    order of ranks. Plain parameters are taken to have the same gradient on all ranks. Every rank of a mesh
    must call it. A 0-d float64 tensor.
    """
    if not any_sharded(params):
        return norms.sum_of_squares([p.grad for p in params if p.grad is not None])
    # By the parameters and not by the gradients, so that every rank makes the same collectives.
    members: dict[ShardLayout | None, list[Tensor]] = {}
    for parameter in params:
        shards = members.setdefault(layout_of(parameter), [])
        if parameter.grad is not None:
            shards.append(local_gradient(parameter, parameter.grad, name_of))
    return global_sum({layout: norms.sum_of_squares(shards) for layout, shards in members.items()})


def global_sum(sums: dict[ShardLayout | None, Tensor]) -> Tensor:
    """Adds this rank's sums of each layout to the sum over all shards; 0-d float64, the same on all ranks."""
    whole = sums.get(None)
    total = torch.zeros((), dtype=torch.float64) if whole is None else whole
    by_mesh: dict[Any, list[ShardLayout]] = {}
    for layout in sums:
        if layout is not None:
            by_mesh.setdefault((layout.mesh, layout.device), []).append(layout)
    for (mesh, device), layouts in by_mesh.items():
        values = torch.stack([sums[layout].to(device) for layout in layouts])
        for dim in sorted({dim for layout in layouts for dim in layout.dims}):
            gathered = torch.empty(mesh.size(dim), len(layouts), dtype=torch.float64, device=device)
            dist.all_gather(list(gathered.unbind()), values, group=mesh.get_group(dim))
            cut = torch.tensor([dim in layout.dims for layout in layouts], device=device)
            values = torch.where(cut, gathered.sum(0), values)
        total = total.to(device) + values.sum()
    return total


# ---- the parts


def _local_moment(parameter: Tensor, key: str, value: Any, name_of: Callable[[Tensor], str]) -> Any:
    if value is None:
        return None
    if is_sharded(value) and not _same_layout(parameter, value):
        raise CheckpointError(
            f"The optimizer state {key} of {name_of(parameter)} is {describe(value)}.",
            f"{describe(parameter)} is expected, like its parameter.",
            "Load it with torch.distributed.checkpoint, or save it with full_state_dict=True.",
        )
    if is_sharded(value):
        return local(value)
    if value.shape != parameter.shape:
        raise CheckpointError(
            f"The optimizer state {key} of {name_of(parameter)} has shape {tuple(value.shape)}.",
            f"{tuple(parameter.shape)} is expected, like its parameter.",
            "Load the state that was saved with this model.",
        )
    from torch.distributed.tensor import distribute_tensor  # imported already: `parameter` is a DTensor

    owner: Any = parameter
    return local(distribute_tensor(value, owner.device_mesh, owner.placements, src_data_rank=None))


def _same_layout(parameter: Any, other: Any) -> bool:
    return (
        is_sharded(parameter)
        and is_sharded(other)
        and parameter.placements == other.placements
        and parameter.device_mesh == other.device_mesh
    )


def _holds(stored: Any, shard: Tensor) -> bool:
    if not is_sharded(stored) or stored.dtype is not shard.dtype:  # all empty shards have one address
        return False
    return bool(stored.to_local().data_ptr() == shard.data_ptr())
