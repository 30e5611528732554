"""Object collectives, checkpoints, functional collectives, groups and meshes."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.comm.consumers.numbers import Numbers


def _thing(rank: int) -> dict[str, Any]:
    """Objects of a length of their own on each rank."""
    return {"rank": rank, "text": "x" * (1 + 1000 * rank), "nested": [None, (rank, 1.5)] * rank}


def objects(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    everything: list[Any] = [None] * world_size
    dist.all_gather_object(everything, _thing(rank))
    gathered: list[Any] | None = [None] * world_size if rank == world_size - 1 else None
    dist.gather_object(_thing(rank), gathered, dst=world_size - 1)
    from_root = [_thing(7), "two", 3] if rank == 1 else [None] * 3
    dist.broadcast_object_list(from_root, src=1)
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, [_thing(peer) for peer in range(world_size)] if rank == 0 else None, src=0)
    passed: list[Any] = [None, None]
    if rank == 0:
        dist.send_object_list([_thing(3), "sent"], dst=1)
    elif rank == 1:
        dist.recv_object_list(passed, src=0)
    return {"all": everything, "gathered": gathered, "from root": from_root, "mine": mine, "passed": passed}


def _shared_folder() -> str:
    name = [tempfile.mkdtemp(prefix="dcp-")] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(name, src=0)
    return str(name[0])


def _saved_and_loaded(numbers: Numbers, in_background: bool) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(numbers.model(), mesh=mesh)
    folder = _shared_folder()
    state = {"model": get_model_state_dict(model), "step": 17}
    if in_background:
        dcp.async_save(state, checkpoint_id=folder).result()
    else:
        dcp.save(state, checkpoint_id=folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = {"model": get_model_state_dict(model), "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    loaded = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    for name, wanted in numbers.model().named_parameters():
        assert torch.equal(loaded[name], wanted)
    dist.barrier()
    files = sorted(path.name for path in Path(folder).iterdir())
    return loaded | {"step": state["step"], "files": files}


def checkpoint(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _saved_and_loaded(numbers, in_background=False)


def checkpoint_in_background(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    return _saved_and_loaded(numbers, in_background=True)


def _functional(x: torch.Tensor, group: Any) -> list[torch.Tensor]:
    world_size = dist.get_world_size()
    splits = [x.shape[0] // world_size] * world_size
    return [
        funcol.all_reduce(x, "sum", group) * 2,
        funcol.all_reduce(x, "avg", group) + 1,
        funcol.all_gather_tensor(x, gather_dim=0, group=group),
        funcol.all_gather_tensor(x, gather_dim=1, group=group),
        funcol.reduce_scatter_tensor(x, "sum", scatter_dim=0, group=group),
        funcol.all_to_all_single(x, splits, splits, group),
        funcol.broadcast(x, 1, group),
        *funcol.all_reduce_coalesced([x, x * 2], "max", group),
        *funcol.all_gather_into_tensor_coalesced([x, x + 1], group),
        *funcol.reduce_scatter_tensor_coalesced([x, x * 2], "sum", [0, 0], group),
    ]


def functional(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    results = _functional(numbers.batch(0, rank), dist.group.WORLD)
    return {str(index): tensor + 0 for index, tensor in enumerate(results)}


def functional_gradients(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    x = numbers.batch(0, rank).requires_grad_()
    gathered = funcol.all_gather_tensor_autograd(x, gather_dim=0, group=dist.group.WORLD)
    scattered = funcol.reduce_scatter_tensor_autograd(
        gathered * 3, "sum", scatter_dim=0, group=dist.group.WORLD
    )
    numbers.loss(scattered).backward()
    assert x.grad is not None
    return {"gradient": x.grad, "value": scattered.detach()}


def functional_compiled(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    """torch.compile traces the functional collectives; the aot_eager backend needs no compiler."""
    compiled = torch.compile(_functional, backend="aot_eager", fullgraph=True)
    results = compiled(numbers.batch(0, rank), dist.group.WORLD)
    return {str(index): tensor + 0 for index, tensor in enumerate(results)}


def coalescing_manager(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    """The fast path: torch collects the calls and makes one coalesced call of them."""
    tensors = [numbers.draw(rank + 10 * index, index + 1) for index in range(3)]
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    inputs = [numbers.draw(rank + 10 * index, 2, 3) for index in range(3)]
    outputs = [torch.empty(2 * world_size, 3, dtype=numbers.dtype) for _ in inputs]
    with dist._coalescing_manager():
        for output, tensor in zip(outputs, inputs, strict=True):
            dist.all_gather_into_tensor(output, tensor)
    wide = [numbers.draw(rank + 10 * index, 2 * world_size, 3) for index in range(3)]
    parts = [torch.empty(2, 3, dtype=numbers.dtype) for _ in wide]
    with dist._coalescing_manager():
        for part, tensor in zip(parts, wide, strict=True):
            dist.reduce_scatter_tensor(part, tensor)
    return {"reduced": tensors, "gathered": outputs, "scattered": parts}


def groups(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    pair, _ = dist.new_subgroups(group_size=2)
    summed = numbers.batch(3, rank)
    dist.all_reduce(summed, group=pair)
    halves, _ = dist.new_subgroups_by_enumeration(
        [list(range(0, world_size, 2)), list(range(1, world_size, 2))]
    )
    kept = numbers.batch(4, rank)
    dist.all_reduce(kept, group=halves)
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("rows", "columns"))
    along_rows = numbers.batch(5, rank)
    dist.all_reduce(along_rows, group=mesh.get_group("rows"))
    flat = mesh._flatten("all").get_group()
    over_all = numbers.batch(6, rank)
    dist.all_reduce(over_all, group=flat)
    dist.barrier(group=pair)
    return {
        "pair": summed,
        "halves": kept,
        "rows": along_rows,
        "all": over_all,
        "mesh": mesh.get_coordinate(),
    }


def barriers(rank: int, world_size: int, numbers: Numbers) -> dict[str, Any]:
    dist.barrier()
    dist.group.WORLD.monitored_barrier(datetime.timedelta(seconds=60), False)
    return {"passed": True}
