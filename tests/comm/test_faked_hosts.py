"""Several hosts, faked on one machine by MLSYS_LOCALITY: other transports, the same results."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from tests.comm.inputs import assert_reduced, tensor_of

LAYOUTS = {
    "each its own host": "0,1,2,3",
    "two and two": "0,0,1,1",
    "interleaved": "0,1,0,1",
    "three and one": "0,0,0,1",
    "three, two and one": "0,0,0,1,1,2",
}


def _collectives(rank, world_size):
    for numel in (0, 1, 3, 1000, 300_007):
        inputs = [tensor_of(peer, numel, torch.float32) for peer in range(world_size)]
        tensor = inputs[rank].clone()
        dist.all_reduce(tensor)
        assert_reduced(tensor, inputs, dist.ReduceOp.SUM)
        tensor = comm.empty(numel).copy_(inputs[rank])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        assert_reduced(tensor, inputs, dist.ReduceOp.MAX)
        whole = torch.empty(numel * world_size)
        dist.all_gather_into_tensor(whole, inputs[rank])
        assert torch.equal(whole, torch.cat(inputs))
        part = torch.empty(numel)
        dist.reduce_scatter_tensor(part, whole)
        assert_reduced(part, [inputs[rank]] * world_size, dist.ReduceOp.SUM)
        for root in range(world_size):
            tensor = inputs[rank].clone()
            dist.broadcast(tensor, root)
            assert torch.equal(tensor, inputs[root])
        received = torch.empty(numel)
        work = dist.isend(inputs[rank], (rank + 1) % world_size)
        dist.recv(received, (rank - 1) % world_size)
        work.wait()
        assert torch.equal(received, inputs[rank - 1])
    objects = [None] * world_size
    dist.all_gather_object(objects, rank)
    assert objects == list(range(world_size))
    return comm.counters()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_collectives_are_right_on_any_layout_of_hosts(run_ranks, layout):
    hosts = LAYOUTS[layout].split(",")
    counted = run_ranks(_collectives, len(hosts), env={"MLSYS_LOCALITY": LAYOUTS[layout]})
    for rank, counters in enumerate(counted):
        alone = hosts.count(hosts[rank]) == 1
        assert (counters.shm_bytes == 0) == alone
        assert counters.tcp_bytes_sent > 0
        assert counters.tcp_bytes_received > 0


def _bits_of_sums(rank, world_size):
    sums = []
    for numel in (5, 4099, 300_007):
        for dtype in (torch.float32, torch.bfloat16):
            mine = tensor_of(rank, numel, dtype)
            private, arena = mine.clone(), comm.empty(numel, dtype).copy_(mine)
            dist.all_reduce(private)
            dist.all_reduce(arena)
            assert torch.equal(private.view(torch.uint8), arena.view(torch.uint8))
            part = torch.empty(numel, dtype=dtype)
            dist.reduce_scatter_tensor(part, mine.repeat(world_size))
            sums += [tensor.view(torch.uint8).numpy().tobytes() for tensor in (private, part)]
    return sums


@pytest.mark.parametrize("layout", ["0,1,2", "0,0,1,2"])
def test_the_bits_of_a_sum_depend_neither_on_sockets_nor_on_where_a_tensor_lies(run_ranks, layout):
    outcomes = [
        run_ranks(
            _bits_of_sums,
            len(layout.split(",")),
            env={"MLSYS_LOCALITY": layout, "MLSYS_SOCKETS_PER_PEER": str(sockets)},
        )
        for sockets in (1, 3)
    ]
    assert outcomes[0] == outcomes[1]
    for sums in outcomes[0]:  # an all-reduce is the same on all ranks
        assert sums[::2] == outcomes[0][0][::2]


def _subgroup_of_the_second_host(rank, world_size):
    group = dist.new_group([2, 3])
    if rank >= 2:
        tensor = torch.ones(100_000)
        dist.all_reduce(tensor, group=group)
        assert (tensor == 2).all()
        counted = comm.counters(group)
        assert counted.shm_bytes > 0
        assert counted.tcp_bytes_sent == 0
    dist.barrier()


def test_locality_goes_by_global_rank_also_in_a_subgroup(run_ranks):
    run_ranks(_subgroup_of_the_second_host, 4, env={"MLSYS_LOCALITY": "0,0,1,1"})


def _one_host(rank, world_size):
    dist.all_reduce(torch.ones(100_000))
    return comm.counters()


def test_ranks_of_one_host_move_payload_through_shared_memory_alone(run_ranks):
    for counters in run_ranks(_one_host, 2):
        assert counters.shm_bytes > 0
        assert (counters.tcp_bytes_sent, counters.tcp_bytes_received) == (0, 0)
