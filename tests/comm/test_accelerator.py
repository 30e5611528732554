"""Tensors of an accelerator go to the backend inside the group, and only they.

No GPU is needed. Either the inner backend is told to serve the CPU's tensors, and is a native group whose
results show that every argument arrived; or the tensors are torch's fake ones, which say that they are on
CUDA and have no memory, and the inner backend is torch's fake group.
"""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions, FakeProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode

from mlsys_engine.comm.accelerator import nccl_maker
from mlsys_engine.comm.cuda_ipc import ipc_preparer
from mlsys_engine.errors import ConfigError, PeerFailedError, UserError
from mlsys_engine.native import load_comm


def _create(options, name, **accelerator):
    return load_comm().create(
        store=dist.PrefixStore(name, options.store),
        rank=options.group_rank,
        size=options.group_size,
        timeout=options.timeout,
        group_name=f"{options.group_id}/{name}",
        global_ranks=list(options.global_ranks_in_group) or list(range(options.group_size)),
        locality=[],
        job_key="",
        sockets_per_peer=1,
        **accelerator,
    )


def _new_group(make_inner, device="cpu"):
    """A group whose tensors on `device` are served by what `make_inner(options)` returns."""
    outers = []

    def create_group(options, _):
        outers.append(
            _create(options, "outer", accelerator=device, make_accelerator=lambda: make_inner(options))
        )
        outers[-1].connect()
        return outers[-1]

    name = f"outer{len(dist.Backend.backend_list)}"
    dist.Backend.register_backend(name, create_group, extended_api=True, devices=["cpu", "cuda"])
    return dist.new_group(backend=name), outers[-1]


def _reductions(group, rank, world_size):
    ranks = range(world_size)
    total = sum(2.0**peer for peer in ranks)
    tensor = torch.full((5,), 2.0**rank)
    dist.all_reduce(tensor, op=dist.ReduceOp.AVG, group=group)
    assert (tensor == total / world_size).all()
    dist.all_reduce(tensor.fill_(2.0**rank), op=dist.ReduceOp.MAX, group=group)
    assert (tensor == 2.0 ** (world_size - 1)).all()
    sparse = torch.full((5,), 2.0**rank).to_sparse()
    dist.all_reduce(sparse, group=group)
    assert (sparse.to_dense() == total).all()
    several = [torch.full((3,), 2.0**rank), torch.full((4,), 3.0 * 2.0**rank)]
    dist.all_reduce_coalesced(several, group=group)
    assert (several[0] == total).all() and (several[1] == 3 * total).all()
    dist.reduce(tensor.fill_(2.0**rank), dst=1, group=group)
    assert rank != 1 or (tensor == total).all()
    parts = [torch.full((2,), 2.0**rank + peer) for peer in ranks]
    part = torch.empty(2)
    dist.reduce_scatter(part, parts, group=group)
    assert (part == total + world_size * rank).all()
    dist.reduce_scatter_tensor(part.zero_(), torch.cat(parts), op=dist.ReduceOp.AVG, group=group)
    assert (part == total / world_size + rank).all()
    group.reduce_scatter_tensor_coalesced([part.zero_()], [torch.cat(parts)]).wait()
    assert (part == total + world_size * rank).all()


def _movements(group, rank, world_size):
    ranks = range(world_size)
    mine = torch.full((3,), float(rank))
    outputs = [torch.empty(3) for _ in ranks]
    dist.all_gather(outputs, mine, group=group)
    assert [float(output[0]) for output in outputs] == list(ranks)
    flat = torch.empty(3 * world_size)
    dist.all_gather_into_tensor(flat, mine, group=group)
    assert torch.equal(flat, torch.cat(outputs))
    group.allgather_into_tensor_coalesced([flat.zero_()], [mine]).wait()
    assert torch.equal(flat, torch.cat(outputs))
    lists = [[torch.empty(3)] for _ in ranks]
    dist.all_gather_coalesced(lists, [mine], group=group)
    assert [float(of_rank[0][0]) for of_rank in lists] == list(ranks)
    tensor = mine.clone()
    dist.broadcast(tensor, src=1, group=group)
    assert (tensor == 1).all()
    dist.gather(mine, [output.zero_() for output in outputs] if rank == 1 else None, dst=1, group=group)
    assert rank != 1 or [float(output[0]) for output in outputs] == list(ranks)
    dist.scatter(tensor, [mine + peer for peer in ranks] if rank == 1 else None, src=1, group=group)
    assert (tensor == 1 + rank).all()
    dist.all_to_all(outputs, [mine * 10 + peer for peer in ranks], group=group)
    assert [float(output[0]) for output in outputs] == [10 * peer + rank for peer in ranks]
    # Rank r sends one row to rank 0 and two to rank 1.
    received = torch.empty((1 + rank) * world_size)
    dist.all_to_all_single(
        received, torch.arange(3.0) + 10 * rank, [1 + rank] * world_size, [1, 2], group=group
    )
    expected = [10.0 * peer + row for peer in ranks for row in ([0] if rank == 0 else [1, 2])]
    assert received.tolist() == expected


def _messages(group, rank, world_size):
    first, second = torch.empty(2), torch.empty(2)
    if rank == 0:
        works = [dist.isend(torch.full((2,), float(tag)), 1, group=group, tag=tag) for tag in (5, 6)]
        works.append(dist.isend(torch.full((2,), 7.0), 1, group=group, tag=7))
        for work in works:
            work.wait()
    else:
        dist.recv(second, 0, group=group, tag=6)
        dist.recv(first, 0, group=group, tag=5)
        assert first.tolist() == [5, 5] and second.tolist() == [6, 6]
        assert dist.recv(first, None, group=group, tag=7) == 0
        assert first.tolist() == [7, 7]


def _sharded(outer, rank, world_size):
    # Two rows of equal parts, with an element of nobody between them and an empty row.
    data = torch.arange(9.0) + 100 * rank
    partition = [0, 2, 4, 4, 4, 4, 5, 7, 9]
    outer.reduce_shard(data, partition, None, None, True).wait()
    mine = [*range(2 * rank, 2 * rank + 2), *range(5 + 2 * rank, 7 + 2 * rank)]
    summed = [2.0 * element + 100 if element in mine else element + 100 * rank for element in range(9)]
    assert data.tolist() == summed
    outer.share_shards(data, partition, True).wait()
    assert data.tolist() == [4 + 100 * rank if element == 4 else 2.0 * element + 100 for element in range(9)]
    # Unequal ones go to the list forms, which this inner backend refuses where NCCL does not.
    with pytest.raises(UserError, match=r"reduce_scatter of .*was given tensors of"):
        outer.reduce_shard(data, [0, 1, 9], None, None, True)
    with pytest.raises(UserError, match=r"all_gather of .*was given tensors of"):
        outer.share_shards(data, [0, 1, 9], True)
    for bad in ([0, 1], [0, 5, 4], [0, 5, 10]):
        with pytest.raises(UserError, match=r"partition of \d offsets that does not fit 9 elements"):
            outer.share_shards(data, bad, True)
    chunks, sums = torch.tensor([[0, 1, 0]]), torch.zeros(1, dtype=torch.float64)
    with pytest.raises(UserError, match="given chunks and a tensor on cpu"):
        outer.reduce_shard(data, [0, 4, 8], chunks, sums, True)


def _everything_forwarded(rank, world_size):
    inners = []

    def make(options):
        inners.append(_create(options, "inner"))
        return inners[-1]

    group, outer = _new_group(make)
    assert inners == []  # not before the first tensor
    _messages(group, rank, world_size)
    _reductions(group, rank, world_size)
    _movements(group, rank, world_size)
    _sharded(outer, rank, world_size)
    dist.barrier(group=group, device_ids=[0])  # which names a device of the accelerator
    assert len(inners) == 1
    assert inners[0].counters()["operations"] >= 16
    assert outer.counters()["operations"] == 0
    assert outer._get_sequence_number_for_group() == inners[0]._get_sequence_number_for_group()
    return True


def test_every_operation_reaches_the_inner_backend_with_its_arguments(run_ranks):
    assert run_ranks(_everything_forwarded, 2) == [True, True]


def _fake_inner(_options):
    options = FakeProcessGroup.Options()
    options.error_on_collective = True
    return FakeProcessGroup._create_internal(0, 2, options)


def _cpu_tensors_stay(rank, world_size):
    def never(_options):
        raise AssertionError("the inner backend was made for CPU tensors")

    group, outer = _new_group(never, device="cuda")
    _reductions(group, rank, world_size)
    _movements(group, rank, world_size)
    _messages(group, rank, world_size)
    dist.barrier(group=group)
    peer = 1 - rank
    sent, received = torch.full((4,), float(rank)), torch.empty(4)
    operations = [dist.P2POp(dist.irecv, received, peer, group), dist.P2POp(dist.isend, sent, peer, group)]
    (work,) = dist.batch_isend_irecv(operations)  # one for all, as on a group with NCCL inside
    future = work.get_future()
    assert work.wait()
    assert [tensor.tolist() for tensor in future.wait()] == [[peer] * 4, [rank] * 4]
    assert received.tolist() == [peer] * 4 and work.is_completed()
    return outer.counters()["operations"] > 16


def test_cpu_tensors_never_reach_the_inner_backend(run_ranks):
    assert run_ranks(_cpu_tensors_stay, 2) == [True, True]


def _cuda_tensors(rank, world_size):
    _, outer = _new_group(_fake_inner, device="cuda")
    host = torch.ones(4)
    with FakeTensorMode():
        device = torch.empty(4, device="cuda")
    calls = (
        lambda: outer.allreduce([device], dist.AllreduceOptions()),
        lambda: outer.allgather([[device, device]], [device], AllgatherOptions()),
        lambda: outer.barrier(_barrier_on("cuda:0")),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="FakeProcessGroup"):
            call()
    outer.barrier(_barrier_on("cpu")).wait()
    with pytest.raises(UserError, match=r"rank \d, all_gather .*several devices: 1 on cuda and 2 elsewhere"):
        outer.allgather([[host, host]], [device], AllgatherOptions())


def _barrier_on(device):
    options = dist.BarrierOptions()
    options.device = torch.device(device)
    options.asyncOp = False
    return options


def test_cuda_tensors_are_told_by_their_device_and_not_mixed_with_others(run_ranks):
    run_ranks(_cuda_tensors, 2)


def _prepared(rank, world_size):
    prepared = []

    def create_group(options, _):
        return _create(
            options,
            "outer",
            make_accelerator=lambda: FakeProcessGroup._create_internal(rank, world_size),
            make_small=lambda device, num_hosts, backend: prepared.append((device, num_hosts, type(backend))),
        )

    dist.Backend.register_backend("prepared", create_group, extended_api=True, devices=["cpu", "cuda"])
    outer = dist.new_group(backend="prepared")._get_backend(torch.device("cuda"))
    outer.connect()
    with FakeTensorMode():
        device = torch.empty(4, device="cuda:1")
    outer.send([device], 1 - rank, 0)
    assert prepared == []  # a message is not a call of all ranks
    for _ in range(2):
        outer.allreduce([device], dist.AllreduceOptions()).wait()
    return prepared == [(1, 1, FakeProcessGroup)]


def test_the_way_for_small_tensors_is_prepared_once_in_the_first_collective(run_ranks):
    assert run_ranks(_prepared, 2) == [True, True]


@pytest.mark.parametrize("choice", ["nccl", "auto"])
def test_a_build_without_cuda_has_no_ipc_all_reduce_and_says_so_only_when_it_was_asked_for(
    monkeypatch, choice
):
    if hasattr(load_comm(), "CudaIpcAllReduce"):
        pytest.skip("this build has CUDA")
    options = SimpleNamespace(group_size=2)
    monkeypatch.setenv("MLSYS_CUDA_ALLREDUCE", choice)
    assert ipc_preparer(options) is None
    monkeypatch.setenv("MLSYS_CUDA_ALLREDUCE", "ipc")
    with pytest.raises(ConfigError, match="built without CUDA"):
        ipc_preparer(options)
    monkeypatch.setenv("MLSYS_CUDA_ALLREDUCE", "fast")
    with pytest.raises(ConfigError, match="'fast'"):
        ipc_preparer(options)


def _without_an_inner_backend(rank, world_size):
    backend = dist.group.WORLD._get_backend(torch.device("cuda"))
    assert backend is dist.group.WORLD._get_backend(torch.device("cpu"))
    assert not backend.supports_coalescing
    with FakeTensorMode():
        device = torch.empty(4, device="cuda")
    with pytest.raises(UserError, match=r"on cuda:0\..*NCCL"):
        backend.allreduce([device], dist.AllreduceOptions())
    dist.barrier(device_ids=[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, whose tensors go to NCCL")
def test_without_a_gpu_cuda_tensors_are_refused_in_words(run_ranks):
    run_ranks(_without_an_inner_backend, 1)


def _peer_dies(rank, world_size):
    inners = []

    def make(options):
        # A world of one, which knows nothing of the other rank: only an abort can end its waits.
        options.group_rank, options.group_size, options.global_ranks_in_group = 0, 1, [rank]
        inners.append(_create(options, f"inner of {rank}"))
        return inners[-1]

    group, _ = _new_group(make)
    dist.all_reduce(torch.ones(3), group=group)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="shut down"):
        inners[0].recv([torch.empty(3)], 0, 9).wait()
    with pytest.raises(PeerFailedError) as caught:
        dist.all_reduce(torch.ones(3), group=group)
    return caught.value.rank, caught.value.op


def test_a_death_aborts_the_inner_backend_and_the_next_operation_names_the_dead(run_ranks_collecting):
    outcomes = run_ranks_collecting(_peer_dies, 2)
    assert outcomes[0].error is None, outcomes[0].error
    assert outcomes[0].value == (1, "all_reduce")


def _ends(rank, world_size):
    inners = []

    def make(options):
        inners.append(_create(options, "inner"))
        return inners[-1]

    group, _ = _new_group(make)
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=group)
    dist.barrier()
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="shut down"):
        inners[0].allreduce([tensor], dist.AllreduceOptions()).wait()


def test_the_inner_backend_ends_with_its_group(run_ranks):
    run_ranks(_ends, 2)


@pytest.mark.skipif(dist.is_nccl_available() and torch.cuda.device_count() > 0, reason="NCCL serves this GPU")
def test_nothing_is_made_where_torch_has_no_nccl():
    assert nccl_maker(None, None, []) is None
