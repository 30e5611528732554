"""CUDA tensors on a GPU: the IPC all-reduce gives the CPU's bits, and the group's collectives reach NCCL."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.comm.cuda_ipc import Exchange, map_peers
from mlsys_engine.native import load_comm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _cuda_build():
    if not hasattr(load_comm(), "CudaIpcAllReduce"):
        pytest.skip("the extension was built without CUDA")


def _connected(rank, world_size):
    """The all-reduce among the ranks: on a GPU each where there are enough, else all on one."""
    device = rank if torch.cuda.device_count() >= world_size else 0
    torch.cuda.set_device(device)
    options = SimpleNamespace(group_rank=rank, group_size=world_size, timeout=timedelta(seconds=60))
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    made = map_peers(load_comm().CudaIpcAllReduce, device, Exchange(store, options), options)
    assert not isinstance(made, list), made
    return made


def _options(op=dist.ReduceOp.SUM):
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


def _values(numel, dtype, rank, seed):
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * seed + rank)).to(dtype)


def _bits(rank, world_size):
    made = _connected(rank, world_size)
    seed = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for numel in (1, 7, 1000, 65_539, 1_000_003):
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
                for offset in (0, 1):  # aligned to 16 bytes, or not
                    seed += 1
                    expected = _values(numel, dtype, rank, seed)
                    device = torch.empty(numel + offset, dtype=dtype, device="cuda")[offset:]
                    device.copy_(expected)
                    made.all_reduce(device, _options(op)).wait()
                    comm.all_reduce(expected, op=op)
                    assert torch.equal(device.cpu(), expected), (dtype, numel, op, offset)
    assert made.failure() == ""


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ipc_all_reduce_gives_the_bits_of_the_cpu(run_ranks, world_size):
    run_ranks(_bits, world_size)


def _captured(rank, world_size):
    made = _connected(rank, world_size)
    tensor = torch.ones(5000, device="cuda")
    made.all_reduce(tensor, _options()).wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.all_reduce(tensor, _options()).wait()
        tensor.mul_(2)
    for seed in range(5):
        expected = _values(5000, torch.float32, rank, seed)
        tensor.copy_(expected)
        graph.replay()
        comm.all_reduce(expected)
        assert torch.equal(tensor.cpu(), expected * 2)


def test_a_captured_ipc_all_reduce_replays(run_ranks):
    run_ranks(_captured, 2)


def _left_alone(rank, world_size):
    made = _connected(rank, world_size)
    if rank == 0:
        made.all_reduce(torch.ones(10, device="cuda"), _options())
        made.stop()
        torch.cuda.synchronize()
        assert "waited for rank 1" in made.failure()
    dist.barrier()


def test_a_wait_on_the_device_ends_when_the_host_says_so(run_ranks):
    run_ranks(_left_alone, 2)


def _through_torch(rank, world_size):
    torch.cuda.set_device(rank)
    for numel in (10, 5_000_000):
        tensor = torch.full((numel,), rank + 1.0, device="cuda")
        dist.all_reduce(tensor)
        assert (tensor == sum(range(1, world_size + 1))).all()
    gathered = torch.empty(world_size, device="cuda")
    dist.all_gather_into_tensor(gathered, torch.tensor([float(rank)], device="cuda"))
    assert gathered.tolist() == list(range(world_size))
    peer = 1 - rank
    received = torch.empty(4, device="cuda")
    sent = torch.full((4,), float(rank), device="cuda")
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
    ):
        work.wait()
    assert received.tolist() == [peer] * 4
    dist.barrier(device_ids=[rank])


@pytest.mark.parametrize("choice", ["nccl", "ipc", "auto"])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of two ranks")
def test_collectives_of_cuda_tensors_reach_nccl_or_the_ipc_all_reduce(run_ranks, choice):
    run_ranks(_through_torch, 2, env={"MLSYS_CUDA_ALLREDUCE": choice})
