"""State of DTensor parameters: checkpoints at other world sizes, state of models that are not cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from mlsys_engine.errors import CheckpointError
from mlsys_engine.optim import AdamW
from tests.optim.sharded_model import model
from tests.optim.variants import gradients_for


def _trained(mesh: Any, steps: range, net: Any = None, optimizer: Any = None) -> Any:
    net = model(mesh) if net is None else net
    optimizer = AdamW(net.named_parameters(), lr=0.05) if optimizer is None else optimizer
    for step in steps:
        for number, parameter in enumerate(net.parameters()):
            gradient = gradients_for(tuple(parameter.shape), 1, seed=50 * step + number)[0]
            parameter.grad = distribute_tensor(gradient, mesh, parameter.placements)
        optimizer.step()
    optimizer.zero_grad()
    return net, optimizer


def _whole(net: nn.Module) -> list[Any]:
    """As numbers: they travel between processes by value."""
    return [parameter.full_tensor().tolist() for parameter in net.parameters()]


def _saves(rank: int, world_size: int, folder: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    net, optimizer = _trained(mesh, range(3))
    state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    full = get_optimizer_state_dict(net, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(full, Path(folder) / "full.pt")
    dist.barrier()
    return _whole(_trained(mesh, range(3, 6), net, optimizer)[0])


def _loads(rank: int, world_size: int, folder: str) -> list[list[Any]]:
    mesh = init_device_mesh("cpu", (world_size,))
    results = []
    for how in ("checkpoint", "full"):
        net = model(mesh)
        optimizer = AdamW(net.named_parameters(), lr=1.0)
        state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        net.load_state_dict(state["model"])
        if how == "checkpoint":
            set_optimizer_state_dict(net, optimizer, state["optimizer"])
        else:
            full = torch.load(Path(folder) / "full.pt", weights_only=True)
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(net, optimizer, full, options=options)
        results.append(_whole(_trained(mesh, range(3, 6), net, optimizer)[0]))
    return results


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_checkpoint_of_two_ranks_continues_with_the_same_bits_at_another_world_size(
    run_ranks: Any, tmp_path: Path, world_size: int
) -> None:
    straight = run_ranks(_saves, 2, str(tmp_path))[0]
    for continued in run_ranks(_loads, world_size, str(tmp_path))[0]:
        assert straight == continued


def _state_of_a_plain_model(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    plain = model()
    optimizer = AdamW(plain.parameters(), lr=0.05)
    for number, parameter in enumerate(plain.parameters()):
        parameter.grad = gradients_for(tuple(parameter.shape), 1, seed=number)[0]
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    sharded, other = _trained(mesh, range(1))
    other.load_state_dict(saved)  # whole tensors: every rank takes its shards
    optimizer.step()
    for number, parameter in enumerate(sharded.parameters()):
        gradient = gradients_for(tuple(parameter.shape), 1, seed=number)[0]
        parameter.grad = distribute_tensor(gradient, mesh, parameter.placements)
    other.step()
    assert _whole(sharded) == [parameter.tolist() for parameter in plain.parameters()]
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointError, match=r"exp_avg of .* as .*Shard"):
        optimizer.step()


def test_state_of_a_plain_model_is_cut_into_shards_and_the_reverse_is_refused(run_ranks: Any) -> None:
    run_ranks(_state_of_a_plain_model, 2)
