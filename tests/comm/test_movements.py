"""The collectives that move bytes: broadcast, gathers, scatter, all_to_all, barrier."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from tests.comm.inputs import tensor_of

DTYPES = (torch.float32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)
SIZES = (0, 1, 3, 65, 5003, 300_007)


def _bytes(rank, numel, dtype, salt=0):
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2, (numel * size,), dtype=torch.uint8, generator=_generator(rank, numel, salt))
    return raw.view(dtype)


def _generator(rank, numel, salt):
    return torch.Generator().manual_seed(7919 * rank + numel + salt)


def _same(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _broadcast(rank, world_size):
    for root in range(world_size):
        for dtype in DTYPES:
            for numel in SIZES:
                tensor = _bytes(rank, numel, dtype)
                dist.broadcast(tensor, src=root)
                assert _same(tensor, _bytes(root, numel, dtype))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_broadcast_copies_any_dtype_from_any_root(run_ranks, world_size):
    run_ranks(_broadcast, world_size)


def _all_gather(rank, world_size):
    for dtype in DTYPES:
        for numel in SIZES:
            expected = [_bytes(peer, numel, dtype) for peer in range(world_size)]
            parts = [torch.empty_like(expected[0]) for _ in range(world_size)]
            dist.all_gather(parts, expected[rank])
            assert all(_same(part, wanted) for part, wanted in zip(parts, expected, strict=True))
            whole = torch.empty(numel * world_size, dtype=dtype)
            dist.all_gather_into_tensor(whole, expected[rank])
            assert _same(whole, torch.cat([value.view(torch.uint8) for value in expected]).view(dtype))
    buffer = torch.zeros(world_size, 50)
    buffer[rank] = tensor_of(rank, 50, torch.float32)
    dist.all_gather_into_tensor(buffer, buffer[rank])  # in place, as FSDP does
    assert torch.equal(
        buffer, torch.stack([tensor_of(peer, 50, torch.float32) for peer in range(world_size)])
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_gather_into_lists_and_flat_buffers_and_in_place(run_ranks, world_size):
    run_ranks(_all_gather, world_size)


def _gather_and_scatter(rank, world_size):
    for root in range(world_size):
        for numel in SIZES:
            expected = [tensor_of(peer, numel, torch.float32, root) for peer in range(world_size)]
            parts = [torch.empty(numel) for _ in range(world_size)] if rank == root else None
            dist.gather(expected[rank], parts, dst=root)
            if parts is not None:
                assert all(torch.equal(part, wanted) for part, wanted in zip(parts, expected, strict=True))
            mine = torch.empty(numel)
            dist.scatter(mine, expected if rank == root else None, src=root)
            assert torch.equal(mine, expected[rank])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gather_and_scatter_with_any_root(run_ranks, world_size):
    run_ranks(_gather_and_scatter, world_size)


def _all_to_all(rank, world_size):
    def rows(source, target):
        return (source + 2 * target) % 4  # differs from pair to pair, zero for some

    def block(source, target):
        return torch.full((rows(source, target), 3), 10.0 * source + target)

    sent = [block(rank, peer) for peer in range(world_size)]
    received = [torch.empty(rows(peer, rank), 3) for peer in range(world_size)]
    dist.all_to_all(received, sent)
    assert all(torch.equal(received[peer], block(peer, rank)) for peer in range(world_size))

    output = torch.empty(sum(len(part) for part in received), 3)
    dist.all_to_all_single(output, torch.cat(sent), [len(p) for p in received], [len(p) for p in sent])
    assert torch.equal(output, torch.cat(received))

    even = torch.empty(2 * world_size)
    dist.all_to_all_single(even, torch.arange(2.0 * world_size) + 100 * rank)
    wanted = [torch.arange(2.0) + 2 * rank + 100 * peer for peer in range(world_size)]
    assert torch.equal(even, torch.cat(wanted))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_to_all_with_sizes_that_differ_by_pair(run_ranks, world_size):
    run_ranks(_all_to_all, world_size)


def _views(rank, world_size):
    whole = torch.zeros(4, 6)
    whole[:, ::2] = rank + 1
    dist.broadcast(whole[:, ::2], src=1)
    assert (whole[:, ::2] == 2).all()
    assert (whole[:, 1::2] == 0).all()
    columns = torch.zeros(5, world_size)
    dist.all_gather([columns[:, peer] for peer in range(world_size)], torch.full((5,), float(rank)))
    assert torch.equal(columns, torch.arange(float(world_size)).expand(5, -1))


def test_views_are_read_and_written_in_place(run_ranks):
    run_ranks(_views, 2)


def _coalesced(rank, world_size):
    tensors = [torch.full((n,), float(rank + 1)) for n in (1, 70, 5000)]
    dist.all_reduce_coalesced(tensors)
    assert all((tensor == world_size * (world_size + 1) / 2).all() for tensor in tensors)
    with dist._coalescing_manager(async_ops=True) as manager:
        outputs = [torch.empty(world_size * n) for n in (2, 3)]
        for output, n in zip(outputs, (2, 3), strict=True):
            dist.all_gather_into_tensor(output, torch.full((n,), float(rank)))
    manager.wait()
    for output, n in zip(outputs, (2, 3), strict=True):
        assert torch.equal(output, torch.arange(float(world_size)).repeat_interleave(n))


def test_coalesced_forms_do_each_of_their_tensors(run_ranks):
    run_ranks(_coalesced, 2)


def _functions(rank, world_size):
    tensor = torch.full((4,), float(rank))
    comm.all_reduce(tensor, op=dist.ReduceOp.MAX)
    assert (tensor == world_size - 1).all()
    comm.broadcast(tensor.fill_(rank), src=1)
    assert (tensor == 1).all()
    whole = torch.empty(4 * world_size)
    comm.all_gather(whole, tensor.fill_(rank))
    assert torch.equal(whole, torch.arange(float(world_size)).repeat_interleave(4))
    part = torch.empty(4)
    comm.reduce_scatter(part, whole)
    assert (part == world_size * rank).all()
    work = comm.reduce(tensor, dst=0, async_op=True)
    work.wait()
    parts = [torch.empty(1) for _ in range(world_size)]
    comm.gather(torch.tensor([float(rank)]), parts if rank == 0 else None)
    comm.scatter(part[:1], parts if rank == 0 else None)
    assert part[0] == rank
    comm.all_to_all(parts, [torch.tensor([float(rank)]) for _ in range(world_size)])
    assert torch.equal(torch.cat(parts), torch.arange(float(world_size)))
    if rank == 0:
        comm.send(torch.tensor([5.0]), dst=1)
    elif rank == 1:
        assert comm.recv(part[:1]) == 0
        assert part[0] == 5
    comm.barrier()
    comm.barrier(timeout_s=60.0)


def test_our_functions_do_what_torch_distributed_does(run_ranks):
    run_ranks(_functions, 2)
