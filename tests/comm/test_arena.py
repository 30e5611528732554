"""Tensors in the shared arena: comm.empty, DDP's buckets, zero copies."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from mlsys_engine import comm
from tests.comm.inputs import assert_reduced, tensor_of


def _empty(rank, world_size):
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        for numel in (0, 1, 1000, 300_001):
            tensor = comm.empty(numel, dtype)
            assert tensor.shape == (numel,)
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
            assert not tensor.any()
            assert numel == 0 or comm.in_arena(tensor)
            assert tensor.data_ptr() % 64 == 0
    assert not comm.in_arena(torch.empty(10))
    with pytest.raises(ValueError, match="negative"):
        comm.empty(-1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_empty_gives_zeroed_aligned_tensors_in_the_arena(run_ranks, world_size):
    run_ranks(_empty, world_size)


def _reused(rank, world_size):
    for step in range(50):
        tensor = comm.empty(100_000)
        assert not tensor.any()  # zero also when the memory was used before
        tensor.fill_(rank + step)
        dist.all_reduce(tensor)
        del tensor


def test_freed_arena_memory_comes_back_zeroed(run_ranks):
    run_ranks(_reused, 2)


def _outliving(rank, world_size):
    group = dist.new_group([0, 1])
    tensor = comm.empty(10_000, group=group).fill_(3)
    dist.all_reduce(tensor, group=group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert (tensor == 6).all()
    tensor += 1
    dist.all_reduce(tensor)  # on another group: private memory to it, still right
    assert (tensor == 14).all()


def test_an_arena_tensor_outlives_its_group(run_ranks):
    run_ranks(_outliving, 2)


def _reduced_in_place(rank, world_size):
    for numel in (1, 1000, 70_001, 1_000_003):
        inputs = [tensor_of(peer, numel, torch.float32) for peer in range(world_size)]
        tensor = comm.empty(numel).copy_(inputs[rank])
        dist.all_reduce(tensor)
        assert_reduced(tensor, inputs, dist.ReduceOp.SUM)
        private = inputs[rank].clone()
        dist.all_reduce(private)
        assert torch.equal(private, tensor)  # the same bits on either road
        part = tensor[numel // 3 : numel // 3 + numel // 2]
        wanted = [value[numel // 3 : numel // 3 + numel // 2] for value in inputs]
        part.copy_(wanted[rank])
        dist.all_reduce(part)
        assert_reduced(part, wanted, dist.ReduceOp.SUM)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_arena_tensors_and_slices_of_them_reduce_like_private_ones(run_ranks, world_size):
    run_ranks(_reduced_in_place, world_size)


def _mixed(rank, world_size):
    inputs = [tensor_of(peer, 500_009, torch.float32) for peer in range(world_size)]
    tensor = inputs[rank].clone() if rank == 0 else comm.empty(500_009).copy_(inputs[rank])
    dist.all_reduce(tensor)
    assert_reduced(tensor, inputs, dist.ReduceOp.SUM)


def test_some_ranks_may_use_the_arena_and_others_not(run_ranks):
    run_ranks(_mixed, 3)


def _zero_copy(rank, world_size):
    tensor = comm.empty(2_000_000)
    before = comm.counters().zero_copy_operations
    dist.all_reduce(tensor)
    return comm.counters().zero_copy_operations - before


def test_a_large_arena_tensor_is_reduced_without_a_staging_copy(run_ranks):
    assert run_ranks(_zero_copy, 2) == [1, 1]


def _ddp_buckets(rank, world_size):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(800, 800), gradient_as_bucket_view=True)
    for _ in range(3):  # the buckets are rebuilt after the first step
        model.zero_grad()
        model(torch.ones(1, 800)).sum().backward()
    return comm.in_arena(model.module.weight.grad), comm.counters().zero_copy_operations > 0


def test_ddp_puts_its_buckets_into_the_arena_unless_told_not_to(run_ranks):
    assert run_ranks(_ddp_buckets, 2) == [(True, True)] * 2
    assert run_ranks(_ddp_buckets, 2, env={"DDP_DISABLE_COMM_MEM": "1"}) == [(False, False)] * 2


def _fsdp_buckets(rank, world_size, wrap, in_arena):
    """Which of the buffers that FSDP2 gives to the collectives lie in the arena."""
    model = torch.nn.Linear(64, 64)
    fully_shard(model)
    if wrap is not None:
        model.set_allocate_memory_from_process_group_for_comm(wrap)
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
            if function.namespace == "c10d":
                tensors = [value for value in args[:2] if isinstance(value, torch.Tensor)]
                seen.update((str(function), comm.in_arena(tensor)) for tensor in tensors)
            return function(*args, **(kwargs or {}))

    with Watch():
        model(torch.ones(1, 64)).sum().backward()
    assert {where for _, where in seen} == {in_arena}, seen
    assert {name.split(".")[1] for name, _ in seen} == {"_allgather_base_", "_reduce_scatter_base_"}


def test_fsdp2_puts_its_buckets_into_the_arena_unless_told_not_to(run_ranks):
    run_ranks(_fsdp_buckets, 2, None, True)
    run_ranks(_fsdp_buckets, 2, False, False)


def _beyond_the_limit(rank, world_size, folder):
    said = Path(folder) / f"stderr-{rank}"  # torch's warnings from C++ go there
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    kept = [comm.empty(100_000) for _ in range(2)]  # 0.8 of 1 MiB
    private = [comm.empty(100_000) for _ in range(3)]
    assert all(comm.in_arena(tensor) for tensor in kept)
    assert not any(comm.in_arena(tensor) for tensor in private)
    for tensor in kept + private:
        tensor.fill_(rank + 1)
        dist.all_reduce(tensor)
        assert (tensor == 3).all()
    return said.read_text().count("raise MLSYS_ARENA_MIB")


def test_beyond_the_arenas_limit_memory_is_private_and_a_warning_says_so_once(run_ranks, tmp_path):
    assert run_ranks(_beyond_the_limit, 2, str(tmp_path), env={"MLSYS_ARENA_MIB": "1"}) == [1, 1]


def _killed_amid_collectives(rank, world_size, victims, folder):
    arena, private = comm.empty(2_000_000), torch.ones(2_000_000)
    dist.all_reduce(arena)
    (Path(folder) / str(rank)).write_text(str(os.getpid()))
    for step in range(1000):
        if step == 3 and rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            dist.all_reduce(arena)
            dist.all_reduce(private)
        except comm.PeerFailedError:
            return True
    return False


def _names_in(folder):
    # Other programs of this machine may run meanwhile, the native tests too: only names that could be ours.
    names = {path.name for path in Path(folder).iterdir()}
    return {name for name in names if "mlsys" in name and not name.startswith("mlsys-test-")}


@pytest.mark.parametrize("victims", [(1,), (0, 1, 2)], ids=["one", "all"])
def test_sigkill_leaves_neither_shared_memory_nor_files(run_ranks_collecting, tmp_path, victims):
    before = _names_in("/dev/shm"), _names_in("/tmp")
    outcomes = run_ranks_collecting(_killed_amid_collectives, 3, victims, str(tmp_path))
    for rank, outcome in enumerate(outcomes):
        assert outcome.exitcode == (-signal.SIGKILL if rank in victims else 0)
        assert outcome.value is (None if rank in victims else True)
        # Memory without a name lives as long as the processes that hold it, and they are gone.
        assert not Path("/proc", (tmp_path / str(rank)).read_text()).exists()
    assert (_names_in("/dev/shm"), _names_in("/tmp")) == before
