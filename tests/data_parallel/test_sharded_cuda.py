"""Sharded optimizer state on GPUs, through NCCL: the bits of unsharded training, no wait for the device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mlsys_engine.data_parallel.build import build_runner
from mlsys_engine.data_parallel.sharded_device import DeviceShardUpdate
from mlsys_engine.numerics import gradient_scale
from mlsys_engine.optim.kernels import is_native
from mlsys_engine.strategies import DataParallel, PlanOptions
from mlsys_engine.strategies.base import Subject
from tests.data_parallel.models import mlp, pairs, squared_error
from tests.data_parallel.sharding import ADAMW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _native_kernels():
    if not is_native(torch.device("cuda")):
        pytest.skip("the extension was built without CUDA kernels")


def _built(device, world_size, shard):
    model = mlp(width=128)  # a weight of several chunks; every parameter is used
    plan = DataParallel(shard=shard, bucket_mib=0.01).plan(
        Subject(model, pairs(1)), world_size, PlanOptions()
    )
    return build_runner(
        plan,
        model,
        optimizer=ADAMW,
        loss=squared_error,
        max_grad_norm=0.5,
        device=device,
        group=dist.group.WORLD,  # of one rank too, which then goes the way of many
    )


def _trained(rank, world_size):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    trained = []
    for shard in ("none", "optimizer"):
        runner = _built(device, world_size, shard)
        results = []
        for step in range(6):
            batches = [pairs(3 + rank, seed=10 * step + part) for part in range(2)]
            if step == 3:
                batches[0][0].fill_(float("inf"))
            result = runner.step(batches)
            results.append((result.loss.item(), result.grad_norm.item(), bool(result.skipped)))
        full = runner.state_dict(full=True)
        weights = {name: value.tolist() for name, value in full["model"].items()}
        moments = {name: value["exp_avg_sq"].tolist() for name, value in full["optimizer"]["state"].items()}
        trained.append((str(results), weights, moments))
    assert isinstance(runner._update, DeviceShardUpdate)
    return trained


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_training_on_gpus_gives_the_bits_of_unsharded_training(run_ranks, world_size):
    # Of two ranks: a sum of two terms has one order, whatever NCCL's algorithm.
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} GPUs are needed, one for each rank")
    for whole, parts in run_ranks(_trained, world_size):
        assert parts == whole


def _unwaited(rank, world_size):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    runner = _built(device, world_size, "optimizer")
    for step in range(2):  # tables are sent and NCCL connects
        runner.step([pairs(3, seed=step)])
    for place in runner._arenas.places:
        place.gradient.fill_(1.0)
        place.parameter.grad = place.gradient
    count = torch.ones((), dtype=torch.float64, device=device)
    before = [place.data.clone() for place in runner._arenas.places]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for bucket in runner._arenas.buckets:
            runner._reduction(bucket)
        runner._reduction.finish()
        runner._update.step(gradient_scale(runner._update.sum_of_squares(), count, 0.5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return all(
        not torch.equal(old, place.data) for old, place in zip(before, runner._arenas.places, strict=True)
    )


def test_reductions_norm_and_step_never_wait_for_the_device(run_ranks):
    assert run_ranks(_unwaited, 1) == [True]
