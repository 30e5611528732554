"""send, recv, any source, tags, batches in any order."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.comm.inputs import tensor_of

SIZES = (0, 1, 1000, 16_384, 16_385, 300_007)  # around the limit between eager and rendezvous


def _ring(rank, world_size):
    for numel in SIZES:
        right, left = (rank + 1) % world_size, (rank - 1) % world_size
        received = torch.empty(numel)
        work = dist.isend(tensor_of(rank, numel, torch.float32), right)
        dist.recv(received, left)
        work.wait()
        assert torch.equal(received, tensor_of(left, numel, torch.float32))


def test_messages_of_any_size_go_round_a_ring(run_ranks):
    run_ranks(_ring, 3)


def _nobody_receives_yet(rank, world_size):
    peer = 1 - rank
    sent = [dist.isend(torch.full((numel,), float(rank)), peer, tag=tag) for tag, numel in enumerate(SIZES)]
    dist.barrier()  # both are here only if no send waited for its receiver
    for tag in reversed(range(len(SIZES))):
        received = torch.empty(SIZES[tag])
        dist.recv(received, peer, tag=tag)
        assert (received == peer).all()
    for work in sent:
        work.wait()


def test_isend_returns_before_the_receiver_is_there_and_tags_may_be_received_in_any_order(run_ranks):
    run_ranks(_nobody_receives_yet, 2)


def _dropped_handles(rank, world_size):
    if rank == 0:
        for index in range(20):
            dist.isend(torch.full((30_000,), float(index)), 1)  # neither handle nor tensor is kept
        dist.barrier()
    else:
        received = [torch.empty(30_000) for _ in range(20)]
        works = [dist.irecv(tensor, 0) for tensor in received]
        for work in works:
            work.wait()
        assert [tensor[-1].item() for tensor in received] == list(range(20))
        dist.barrier()


def test_messages_of_equal_tags_arrive_in_order_also_when_the_handles_are_dropped(run_ranks):
    run_ranks(_dropped_handles, 2)


def _any_source(rank, world_size):
    if rank == 0:
        seen = {}
        for _ in range(world_size - 1):
            tensor = torch.empty(3)
            source = dist.recv(tensor)
            seen[source] = tensor[0].item()
        assert seen == {peer: float(peer) for peer in range(1, world_size)}
    else:
        dist.send(torch.full((3,), float(rank)), 0)
    dist.barrier()


def test_a_receive_from_anyone_tells_who_sent(run_ranks):
    run_ranks(_any_source, 4)


def _batches(rank, world_size):
    peers = [peer for peer in range(world_size) if peer != rank]
    for order in itertools.permutations(range(2 * len(peers))):
        received = {peer: torch.empty(17) for peer in peers}
        operations = [dist.P2POp(dist.isend, torch.full((17,), float(rank)), peer) for peer in peers]
        operations += [dist.P2POp(dist.irecv, received[peer], peer) for peer in peers]
        shuffled = order if rank % 2 == 0 else tuple(reversed(order))
        for work in dist.batch_isend_irecv([operations[index] for index in shuffled]):
            work.wait()
        assert all((received[peer] == peer).all() for peer in peers)


def test_batch_isend_irecv_works_in_any_order(run_ranks):
    run_ranks(_batches, 3)


def _beside_collectives(rank, world_size):
    peer = 1 - rank
    for step in range(20):
        total = torch.ones(5000)
        reducing = dist.all_reduce(total, async_op=True)
        received = torch.empty(2000)
        receiving = dist.irecv(received, peer)
        sending = dist.isend(torch.full((2000,), float(step)), peer)
        for work in (receiving, sending, reducing):
            work.wait()
        assert (received == step).all()
        assert (total == 2).all()


def test_messages_pass_beside_collectives_under_way(run_ranks):
    run_ranks(_beside_collectives, 2)


def _first_of_all(rank, world_size):
    store = dist.distributed_c10d._get_default_store()
    tensor = torch.full((5,), float(rank))
    if rank == 0:
        dist.send(tensor, 1)
    elif rank == 1:
        dist.recv(tensor, 0)
        store.set("it came", "")
    else:
        store.wait(["it came"])  # and does nothing in the group meanwhile
    dist.barrier()  # rank 0 serves the store
    return tensor.tolist()


@pytest.mark.parametrize("locality", ["", "0,1,2"], ids=["one host", "three hosts"])
def test_the_first_operation_of_a_job_may_be_a_message_that_a_third_rank_knows_nothing_of(
    run_ranks, locality
):
    values = run_ranks(_first_of_all, 3, env={"MLSYS_LOCALITY": locality})
    assert values[1] == [0.0] * 5


def _futures(rank, world_size):
    tensor = torch.full((5,), float(rank))
    work = dist.isend(tensor, 1) if rank == 0 else dist.irecv(tensor, 0)
    assert torch.equal(work.get_future().wait()[0], torch.zeros(5))
    assert work.is_completed()
    assert work.is_success()
    dist.barrier()


def test_point_to_point_works_have_futures(run_ranks):
    run_ranks(_futures, 2)
