"""Groups, handles and futures: subgroups, overlapping operations, callbacks, object collectives."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from mlsys_engine import comm
from tests.comm.inputs import tensor_of


def _subgroups(rank, world_size):
    members = [list(part) for size in (1, 2, 3) for part in itertools.combinations(range(world_size), size)]
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in members}
    for ranks, group in groups.items():
        if rank not in ranks:
            continue
        tensor = torch.tensor([float(rank)])
        dist.all_reduce(tensor, group=group)
        assert tensor.item() == sum(ranks)
        dist.broadcast(tensor.fill_(rank), src=ranks[-1], group=group)
        assert tensor.item() == ranks[-1]
        assert dist.get_backend(group) == "mlsys"
    dist.barrier()


def test_every_subgroup_of_four_ranks_works_on_its_own(run_ranks):
    run_ranks(_subgroups, 4)


def _destroyed_group(rank, world_size):
    group = dist.new_group([0, 1])
    dist.barrier(group=group)
    dist.destroy_process_group(group)
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    assert tensor.item() == world_size


def test_destroying_a_subgroup_leaves_the_job_alone(run_ranks):
    run_ranks(_destroyed_group, 2)


def _overlapping(rank, world_size):
    sizes = [1, 100_003, 5, 70_001, 0, 9] * 5
    tensors = [tensor_of(rank, numel, torch.float64, salt) for salt, numel in enumerate(sizes)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    blocking = torch.ones(3)
    dist.all_reduce(blocking)  # queues behind all of them
    assert all(work.is_completed() for work in works)
    for work, tensor, (salt, numel) in zip(works, tensors, enumerate(sizes), strict=True):
        work.wait()
        expected = sum(tensor_of(peer, numel, torch.float64, salt) for peer in range(world_size))
        assert torch.equal(tensor, expected)
    assert (blocking == world_size).all()


def test_many_operations_under_way_finish_in_call_order(run_ranks):
    run_ranks(_overlapping, 2)


def _two_groups(rank, world_size):
    other = dist.new_group([0, 1])
    first, second = torch.ones(200_000), torch.ones(200_000)
    works = [dist.all_reduce(first, async_op=True), dist.all_reduce(second, group=other, async_op=True)]
    for work in works if rank == 0 else reversed(works):
        work.wait()
    assert (first == 2).all()
    assert (second == 2).all()


def test_operations_of_two_groups_do_not_wait_for_each_other(run_ranks):
    run_ranks(_two_groups, 2)


def _futures(rank, world_size):
    tensor = torch.ones(1000)
    future = dist.all_reduce(tensor, async_op=True).get_future()
    doubled = future.then(lambda done: done.value()[0] * 2)
    assert (doubled.wait() == 2 * world_size).all()
    work = dist.broadcast(tensor, 0, async_op=True)
    work.wait()
    assert work.get_future().done()  # asked for after completion
    assert torch.equal(work.result()[0], tensor)


def test_futures_hold_the_list_of_tensors_before_and_after_completion(run_ranks):
    run_ranks(_futures, 2)


def _nested(rank, world_size):
    first, second = torch.ones(3000), torch.ones(3000)

    def continue_with_another(_):
        # What PowerSGD's hook does: a collective inside the callback of a collective, waited for right there.
        return dist.all_reduce(second, async_op=True).get_future().wait()[0]

    chained = dist.all_reduce(first, async_op=True).get_future().then(continue_with_another)
    assert (chained.wait() == world_size).all()


def test_a_callback_may_wait_for_a_collective_of_its_own(run_ranks):
    run_ranks(_nested, 2)


def _objects(rank, world_size):
    gathered = [None] * world_size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * (1000 * rank)})
    assert [value["rank"] for value in gathered] == list(range(world_size))
    objects = [("from", 1), None] if rank == 1 else [None, None]
    dist.broadcast_object_list(objects, src=1)
    assert objects == [("from", 1), None]
    collected = [None] * world_size if rank == 0 else None
    dist.gather_object(rank * 7, collected, dst=0)
    assert rank != 0 or collected == [7 * peer for peer in range(world_size)]
    mine = [None]
    dist.scatter_object_list(
        mine, [f"for {peer}" for peer in range(world_size)] if rank == 0 else None, src=0
    )
    assert mine == [f"for {rank}"]


def test_object_collectives(run_ranks):
    run_ranks(_objects, 3)


def _sequences(rank, world_size):
    group = dist.group.WORLD._get_backend(torch.device("cpu"))
    before = group._get_sequence_number_for_group()
    for _ in range(3):
        dist.all_reduce(torch.ones(1))
    return group._get_sequence_number_for_group() - before


def test_the_sequence_number_counts_the_collectives(run_ranks):
    assert run_ranks(_sequences, 2) == [3, 3]


def _monitored(rank, world_size):
    dist.group.WORLD.monitored_barrier()


def test_a_monitored_barrier_lets_all_ranks_pass(run_ranks):
    run_ranks(_monitored, 3)


def _counted(rank, world_size):
    before = comm.counters()
    tensor = torch.ones(1_000_000)
    dist.all_reduce(tensor)
    after = comm.counters()
    moved = (after.shm_bytes - before.shm_bytes) + (after.tcp_bytes_sent - before.tcp_bytes_sent)
    assert after.operations == before.operations + 1
    # However it is done, half of the sum has to come from the other rank: 2 MB of the 4.
    assert moved >= tensor.nbytes / 2
    return comm.describe_transports()


def test_counters_show_the_bytes_that_moved(run_ranks):
    assert all(run_ranks(_counted, 2))


def _first_a_message(rank, world_size):
    group = dist.new_group([0, 1, 2])
    if rank < 2:
        tensor = torch.full((200_000,), float(rank))  # more than is sent before the receiver has asked for it
        (dist.send if rank == 0 else dist.recv)(tensor, 1 - rank, group=group)
        assert (tensor == 0).all()
    dist.barrier()  # the third rank goes here at once, and has done nothing in the group


def test_the_first_operation_of_a_group_may_be_a_message_that_others_know_nothing_of(run_ranks):
    run_ranks(_first_a_message, 3)
