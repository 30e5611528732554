"""DDP, FSDP2, DTensor and DCP over the native group, with gloo impossible to construct."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mlsys_engine import comm
from tests.support.no_gloo import forbid_gloo

STEPS, BATCH, WIDTH = 5, 12, 16


def _model():
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Linear(WIDTH, 32), torch.nn.Tanh(), torch.nn.Linear(32, WIDTH), torch.nn.Linear(WIDTH, 1)
    ).double()


def _batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)


def _train(model, share):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(share(_batch(step))).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _reference():
    model = _model()
    _train(model, lambda batch: batch)
    return model


def _close(left, right):
    # float64: a few steps, each of sums over fewer than 100 terms (1e-14); 1e-12 leaves orders of magnitude.
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def _ddp(rank, world_size):
    forbid_gloo()
    model = torch.nn.parallel.DistributedDataParallel(_model())
    _train(model, lambda batch: batch.chunk(world_size)[rank])
    for mine, wanted in zip(model.module.parameters(), _reference().parameters(), strict=True):
        _close(mine, wanted)
    counted = comm.counters()
    assert counted.shm_bytes + counted.tcp_bytes_sent > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_with_ddp_equals_training_on_one_rank(run_ranks, world_size):
    run_ranks(_ddp, world_size)


def _fsdp(rank, world_size):
    forbid_gloo()
    mesh = init_device_mesh("cpu", (world_size,))
    model = _model()
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train(model, lambda batch: batch.chunk(world_size)[rank])
    for mine, wanted in zip(model.parameters(), _reference().parameters(), strict=True):
        _close(mine.full_tensor(), wanted)


def test_training_with_fsdp2_equals_training_on_one_rank(run_ranks):
    run_ranks(_fsdp, 2)


def _dtensor(rank, world_size):
    forbid_gloo()
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(3)
    whole = torch.randn(8, 6, dtype=torch.float64)
    by_rows = distribute_tensor(whole, mesh, [Shard(0)])
    by_columns = by_rows.redistribute(mesh, [Shard(1)])
    assert torch.equal(by_columns.full_tensor(), whole)
    product = by_rows.t() @ by_rows  # partial sums, reduced when they are asked for
    assert isinstance(product, DTensor)
    _close(product.redistribute(mesh, [Replicate()]).to_local(), whole.t() @ whole)


def test_dtensor_redistributes_and_reduces(run_ranks):
    run_ranks(_dtensor, 2)


def _checkpoint(rank, world_size, folder):
    forbid_gloo()
    mesh = init_device_mesh("cpu", (world_size,))
    model = _model()
    wanted = copy.deepcopy(model.state_dict())
    fully_shard(model, mesh=mesh)
    state = {"model": get_model_state_dict(model), "step": 17}
    dcp.save(state, checkpoint_id=folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = {"model": get_model_state_dict(model), "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    assert state["step"] == 17
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), wanted[name])
    dist.barrier()


def test_a_distributed_checkpoint_is_saved_and_loaded(run_ranks, tmp_path):
    run_ranks(_checkpoint, 2, str(tmp_path / "checkpoint"))


def _join(rank, world_size):
    forbid_gloo()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    with model.join():
        for _ in range(3 + rank):  # uneven numbers of batches
            model(torch.ones(2, 4)).sum().backward()


def test_ddp_join_with_uneven_inputs(run_ranks):
    run_ranks(_join, 2)


def _unused(rank, world_size):
    forbid_gloo()
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 1) for _ in range(world_size + 1)])

    class OneOf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers[rank](x)  # every rank uses another one; the last is used by nobody

    model = torch.nn.parallel.DistributedDataParallel(OneOf(), find_unused_parameters=True)
    model(torch.ones(2, 4)).sum().backward()
    for layer in layers[:world_size]:
        _close(layer.weight.grad, torch.full((1, 4), 2.0 / world_size))
    assert layers[world_size].weight.grad is None


def test_ddp_with_unused_parameters(run_ranks):
    run_ranks(_unused, 2)
