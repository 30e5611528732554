"""Survivors of a failure form a smaller job and go on: who, as which rank, with what state."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.comm.launch import current_world, launch_local
from mlsys_engine.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    LaunchError,
    PeerFailedError,
)
from tests.support.kills import held

LAYOUTS = pytest.mark.parametrize("locality", ["", "0,0,1,1"], ids=["one host", "two hosts"])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _all_reduce_until_it_fails() -> PeerFailedError:
    with pytest.raises(PeerFailedError) as caught:
        while True:
            dist.all_reduce(torch.ones(50_000))
    return caught.value


def _sum_of(number: float) -> float:
    tensor = torch.tensor([number])
    dist.all_reduce(tensor)
    return tensor.item()


def _die_one_after_the_other(rank: int, world_size: int, victims: list[int]) -> list[tuple[int, int, float]]:
    """The (rank, world size, sum of the old ranks) after each death."""
    seen = []
    _sum_of(rank)
    for victim in victims:
        if rank == victim:
            _die()
        assert _all_reduce_until_it_fails().rank >= 0
        world = comm.reconfigure()
        assert world is current_world()
        assert (world.rank, world.world_size) == (dist.get_rank(), dist.get_world_size())
        assert len(world.hosts) == world.world_size
        seen.append((world.rank, world.world_size, _sum_of(rank)))
    return seen


@LAYOUTS
@pytest.mark.parametrize("victims", [[2], [0], [0, 1], [3, 0]], ids=str)
def test_survivors_go_on_as_a_smaller_job(run_ranks_collecting, victims, locality):
    outcomes = run_ranks_collecting(_die_one_after_the_other, 4, victims, env={"MLSYS_LOCALITY": locality})
    left = [0, 1, 2, 3]
    for number, victim in enumerate(victims):
        left = [rank for rank in left if rank != victim]
        for rank in set(left) - set(victims[number + 1 :]):
            assert outcomes[rank].error is None, outcomes[rank].error
            assert outcomes[rank].value[number] == (left.index(rank), len(left), sum(left))


def _all_but_one(rank: int, world_size: int) -> tuple[int, int]:
    _sum_of(rank)
    if rank == 0:
        _die()
    _all_reduce_until_it_fails()
    world = comm.reconfigure()
    dist.barrier()
    return world.rank, world.world_size


def test_the_last_survivor_is_a_world_of_one(run_ranks_collecting):
    assert run_ranks_collecting(_all_but_one, 2)[1].value == (0, 1)


def _dies_under_asynchronous_work(rank: int, world_size: int) -> float:
    subgroup = dist.new_group([0, 1])
    _sum_of(rank)
    if rank == 2:
        _die()
    works = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(5)]
    with pytest.raises(PeerFailedError):
        for work in works:
            work.wait()
    comm.reconfigure()
    if rank in (0, 1):
        with pytest.raises((RuntimeError, ValueError)):
            dist.all_reduce(torch.ones(1), group=subgroup)
    return _sum_of(1.0)


def test_work_under_way_is_failed_and_subgroups_are_no_more(run_ranks_collecting):
    outcomes = run_ranks_collecting(_dies_under_asynchronous_work, 4)
    for rank in (0, 1, 3):
        assert (outcomes[rank].value, outcomes[rank].error) == (3.0, None)


def _nobody_died(rank: int, world_size: int, kind: str) -> tuple[int, int, float]:
    store = dist.distributed_c10d._get_default_store()
    _sum_of(rank)
    if kind == "mismatch":
        with pytest.raises(CollectiveMismatchError):
            dist.all_reduce(torch.ones(2 + rank))
    elif rank == 0:
        with pytest.raises(CollectiveTimeoutError):
            comm.barrier(timeout_s=0.1)
        store.set("rank 0 gave up", "")
    else:
        store.wait(["rank 0 gave up"])
        with pytest.raises(CollectiveTimeoutError, match="timed out"):
            dist.all_reduce(torch.ones(1))
    world = comm.reconfigure()
    return world.rank, world.world_size, _sum_of(1.0)


@pytest.mark.parametrize("kind", ["mismatch", "timeout"])
def test_everyone_goes_on_after_a_failure_without_a_death(run_ranks, kind):
    assert run_ranks(_nobody_died, 3, kind) == [(rank, 3, 3.0) for rank in range(3)]


def _one_stays_away(rank: int, world_size: int) -> tuple[int, int] | str:
    store = dist.distributed_c10d._get_default_store()
    _sum_of(rank)
    if rank == 1:
        store.wait(["the others went on"])
        with pytest.raises(LaunchError) as caught:
            comm.reconfigure(timeout_s=5.0)
        store.set("rank 1 knows", "")
        return str(caught.value)
    comm.poison("a test")
    old = dist.distributed_c10d._get_default_store()
    world = comm.reconfigure(timeout_s=0.5)
    if world.rank == 0:
        old.set("the others went on", "")
    old.wait(["rank 1 knows"])
    dist.barrier()
    return world.rank, world.world_size


def test_a_rank_that_does_not_come_is_left_out_and_told_so(run_ranks):
    first, late, last = run_ranks(_one_stays_away, 3)
    assert (first, last) == ((0, 2), (1, 2))
    assert "went on without it" in late


# One thread of the new store's server, with its sockets, on the rank that serves it.
MORE_DESCRIPTORS, MORE_THREADS = 8, 2


def _resources(rank: int, world_size: int) -> tuple[int, int]:
    _sum_of(rank)
    dist.barrier()
    gc.collect()
    before = held()
    if rank == 1:
        _die()
    _all_reduce_until_it_fails()
    comm.reconfigure()
    dist.all_reduce(torch.ones(50_000))
    deadline = time.monotonic() + 20
    while True:  # the store's server closes the connections of those who left when it gets to it
        gc.collect()
        after = held()
        more = len(after[0]) - len(before[0]), after[1] - before[1]
        if (more[0] <= MORE_DESCRIPTORS and more[1] <= MORE_THREADS) or time.monotonic() > deadline:
            return more
        os.sched_yield()


def test_the_old_groups_threads_and_descriptors_are_released(run_ranks_collecting):
    outcomes = run_ranks_collecting(_resources, 3)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        more_descriptors, more_threads = outcomes[rank].value
        assert more_descriptors <= MORE_DESCRIPTORS, outcomes[rank].value
        assert more_threads <= MORE_THREADS, outcomes[rank].value


def _trains_on(rank: int, world_size: int) -> list[float]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.arange(24.0).reshape(3, 8) / 24

    def step(parallel: torch.nn.Module) -> None:
        optimizer.zero_grad()
        parallel(data).square().mean().backward()
        optimizer.step()

    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        step(parallel)
    if rank == 0:
        _die()
    with pytest.raises(PeerFailedError):
        while True:
            step(parallel)
    comm.reconfigure()
    state = [parameter.detach().clone() for parameter in model.parameters()]
    for tensor in state:  # survivors agree about where they stand
        dist.broadcast(tensor, 0)
    with torch.no_grad():
        for parameter, tensor in zip(model.parameters(), state, strict=True):
            parameter.copy_(tensor)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(3):
        step(parallel)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()


def test_a_training_goes_on_with_the_model_that_is_left(run_ranks_collecting):
    outcomes = run_ranks_collecting(_trains_on, 3)
    for rank in (1, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
    assert outcomes[1].value == outcomes[2].value
    assert torch.tensor(outcomes[1].value).isfinite().all()


def test_without_a_job_there_is_nothing_to_reconfigure():
    with pytest.raises(LaunchError, match="without a job"):
        comm.reconfigure()


ELASTIC = """
import os, signal, sys, torch, mlsys_engine as mls, torch.distributed as dist
world = mls.init()
dist.barrier()
if world.rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        dist.barrier()
except mls.comm.PeerFailedError:
    world = mls.comm.reconfigure()
dist.barrier()
open(sys.argv[1] + f"/{world.rank}-of-{world.world_size}", "w").close()
"""


@pytest.mark.slow
def test_the_local_launcher_lets_survivors_go_on_when_asked(tmp_path: Path, capfd):
    script = tmp_path / "elastic.py"
    script.write_text(ELASTIC)
    command = [sys.executable, str(script), str(tmp_path)]
    assert launch_local(command, 3, tolerate_failures=True) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"0-of-2", "1-of-2"}
    assert "rank 0 of 3 was killed by SIGKILL; the others may go on" in capfd.readouterr().err
