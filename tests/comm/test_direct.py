"""The short way of `mls.comm`: it gives what torch.distributed gives, and what it declines torch does."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mlsys_engine import comm
from mlsys_engine.comm.groups import direct_group, native_group
from mlsys_engine.errors import CollectiveTimeoutError, PeerFailedError
from tests.comm.inputs import SIZES, tensor_of


def _forbid_torch(monkeypatch):
    """Makes every function of torch.distributed that the direct way replaces fail when it is called."""

    def forbidden(*_args, **_kwargs):
        raise AssertionError("the call took torch's road")

    for name in ("all_reduce", "reduce", "broadcast", "gather", "scatter", "all_to_all", "send", "recv"):
        monkeypatch.setattr(dist, name, forbidden)
    for name in ("_all_gather_single", "_reduce_scatter_single"):
        monkeypatch.setattr(f"mlsys_engine.comm.functional.{name}", forbidden)


def _every_function(rank, world_size, numel):
    ranks = range(world_size)
    inputs = [tensor_of(r, numel, torch.int64) for r in ranks]
    total = torch.stack(inputs).sum(0)
    mine = inputs[rank].clone()
    comm.all_reduce(mine)
    assert torch.equal(mine, total)
    mine = inputs[rank].clone()
    comm.reduce(mine, dst=world_size - 1, op=dist.ReduceOp.MAX)
    assert torch.equal(mine, torch.stack(inputs).amax(0) if rank == world_size - 1 else inputs[rank])
    whole = torch.empty(numel * world_size, dtype=torch.int64)
    comm.all_gather(whole, inputs[rank])
    assert torch.equal(whole, torch.cat(inputs))
    part = torch.empty(numel, dtype=torch.int64)
    comm.reduce_scatter(part, whole)
    assert torch.equal(part, inputs[rank] * world_size)
    mine = inputs[rank].clone()
    comm.broadcast(mine, src=world_size - 1)
    assert torch.equal(mine, inputs[-1])
    outputs = [torch.empty_like(mine) for _ in ranks]
    comm.gather(inputs[rank], outputs if rank == 0 else None)
    assert rank != 0 or all(map(torch.equal, outputs, inputs))
    comm.scatter(mine, inputs if rank == 0 else None)
    assert torch.equal(mine, inputs[rank])
    comm.all_to_all(outputs, [inputs[rank]] * world_size)
    assert all(map(torch.equal, outputs, inputs))
    comm.barrier()
    comm.barrier(timeout_s=30.0)


def _direct(rank, world_size):
    with pytest.MonkeyPatch.context() as monkeypatch:
        _forbid_torch(monkeypatch)
        for numel in SIZES:
            _every_function(rank, world_size, numel)
        if world_size > 1:
            _messages(rank, world_size)


def _messages(rank, world_size):
    """Rank 0 sends to all; all answer, and rank 0 takes the answers from anyone."""
    got = torch.empty(3)
    if rank == 0:
        for peer in range(1, world_size):
            comm.send(torch.full((3,), float(peer)), peer, tag=7)
        senders = [comm.recv(got, tag=8) for _ in range(1, world_size)]
        assert sorted(senders) == list(range(1, world_size))
    else:
        assert comm.recv(got, 0, tag=7) == 0
        assert got.tolist() == [rank] * 3
        comm.send(got, 0, tag=8)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_function_goes_straight_to_the_native_group_and_is_right(run_ranks, world_size):
    run_ranks(_direct, world_size)


def test_the_direct_way_works_between_faked_hosts(run_ranks):
    run_ranks(_direct, 3, env={"MLSYS_LOCALITY": "0,0,1"})


def _premultiplied(rank, world_size):
    tensor = torch.full((5,), float(rank + 1))
    comm.all_reduce(tensor, op=dist._make_nccl_premul_sum(0.5))
    assert tensor.tolist() == [1.5] * 5


def test_operations_with_a_factor_take_the_direct_way(run_ranks):
    run_ranks(_premultiplied, 2)


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def _declined(rank, world_size):
    with _Counting() as counting:
        comm.all_reduce(torch.ones(3))
    assert any("allreduce" in name for name in counting.seen), counting.seen
    columns = torch.ones(4, 4)[:, 1]
    comm.all_reduce(columns)
    assert columns.tolist() == [world_size] * 4
    complex_ones = torch.ones(3, dtype=torch.complex64)
    comm.all_reduce(complex_ones)
    assert complex_ones.tolist() == [world_size] * 3
    sparse = torch.ones(3).to_sparse()
    comm.all_reduce(sparse)
    assert sparse.to_dense().tolist() == [world_size] * 3
    leaf = torch.nn.Parameter(torch.ones(3))
    comm.all_reduce(leaf)
    assert leaf.tolist() == [world_size] * 3
    assert leaf.requires_grad
    with pytest.raises(TypeError):
        comm.all_reduce([1.0])
    with pytest.raises(ValueError, match="root 99"):
        comm.broadcast(torch.ones(3), src=99)
    with pytest.raises(ValueError, match="should not be the same as"):
        comm.send(torch.ones(3), rank)


def test_calls_that_are_not_plain_are_torchs_with_its_results_and_words(run_ranks):
    run_ranks(_declined, 2)


def _coalesced(rank, world_size):
    tensors = [torch.ones(3), torch.ones(5)]
    with dist._coalescing_manager():
        for tensor in tensors:
            comm.all_reduce(tensor)
        assert tensors[0].tolist() == [1.0] * 3  # collected, not done
    assert all(tensor.unique().tolist() == [world_size] for tensor in tensors)


def test_inside_a_coalescing_manager_torch_collects_the_calls(run_ranks):
    run_ranks(_coalesced, 2)


def _in_order(rank, world_size):
    works, tensors = [], []
    for number in range(50):
        tensors.append(torch.full((number * 97,), float(rank)))
        works.append(comm.all_reduce(tensors[-1], async_op=True))
        tensors.append(torch.full((3,), float(rank)))
        comm.broadcast(tensors[-1], src=number % world_size)  # waits for what is queued, in order
        assert tensors[-1].tolist() == [float(number % world_size)] * 3
    for work in works:
        work.wait()
    for tensor in tensors[::2]:
        assert torch.equal(tensor, torch.full_like(tensor, world_size * (world_size - 1) / 2))


def test_direct_calls_keep_the_order_with_queued_asynchronous_ones(run_ranks):
    run_ranks(_in_order, 2)


def _waits_without_the_lock(rank, world_size):
    if rank == 0:
        ran = []
        other = threading.Thread(target=lambda: (ran.append(True), comm.send(torch.ones(1), 1)))
        started = threading.Thread(target=other.start)
        started.start()
        comm.barrier()  # rank 1 comes only after the other thread's message
        assert ran
        started.join()
        other.join()
    else:
        comm.recv(torch.empty(1), 0)
        comm.barrier()


def test_python_threads_run_while_a_direct_call_waits(run_ranks):
    run_ranks(_waits_without_the_lock, 2)


def _cached(rank, world_size):
    first = direct_group()
    assert direct_group() is first is native_group()
    pair = dist.new_group([0, 1])
    inside = direct_group(pair)
    assert inside is native_group(pair)
    assert inside is not first
    tensor = torch.ones(1)
    comm.all_reduce(tensor, group=pair)
    assert tensor.item() == 2.0
    dist.destroy_process_group(pair)
    with pytest.raises(RuntimeError, match="shut down"):
        comm.all_reduce(tensor, group=pair)
    del pair
    again = dist.new_group([0, 1])
    assert direct_group(again) is native_group(again)
    comm.all_reduce(tensor, group=again)
    assert tensor.item() == 4.0


def test_a_group_is_found_again_and_never_mistaken_for_a_destroyed_one(run_ranks):
    run_ranks(_cached, 2)


def _times_out(rank, world_size):
    store = dist.distributed_c10d._get_default_store()
    comm.barrier()
    if rank == 1:
        store.wait(["rank 0 gave up"])
        return
    with pytest.raises(CollectiveTimeoutError, match=r"rank 0, barrier of group .*Not arrived: rank 1"):
        comm.barrier(timeout_s=0.05)
    store.set("rank 0 gave up", "")


def _fails(rank, world_size):
    if rank == 1:
        comm.poison("out of luck")
        return
    with pytest.raises(PeerFailedError, match="out of luck") as caught:
        comm.all_reduce(torch.ones(3))
    assert (caught.value.rank, caught.value.op) == (1, "all_reduce")


def test_failures_carry_the_same_fields_as_from_a_work(run_ranks):
    run_ranks(_fails, 2)


def test_a_timeout_of_a_direct_call_names_who_is_missing(run_ranks):
    run_ranks(_times_out, 2)


def _profiled(rank, world_size):
    with torch.profiler.profile() as profile:
        comm.all_reduce(torch.ones(3))
    assert "mlsys:all_reduce" in {event.key for event in profile.key_averages()}


def test_the_profiler_sees_direct_calls(run_ranks):
    run_ranks(_profiled, 2)


def _warned(rank, world_size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comm.all_gather(torch.empty(2 * world_size), torch.ones(2), async_op=True).wait()
        comm.reduce_scatter(torch.empty(2), torch.ones(2 * world_size), async_op=True).wait()


def test_functions_do_not_use_names_that_torch_deprecates(run_ranks):
    run_ranks(_warned, 2)
