"""A peer that raises, dies, stalls or calls something else: who is told what."""

from __future__ import annotations

import datetime
import os
import pickle
import signal

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.errors import CollectiveMismatchError, CollectiveTimeoutError, PeerFailedError

# Operations have half an hour here: whoever raises earlier learned of the failure itself. How soon is
# measured by benchmarks/faults.py.


def _failure_of(operation):
    """What `operation` raises when it is repeated until it fails."""
    while True:
        try:
            operation()
        except PeerFailedError as error:
            return error


def _killed(rank, world_size, numel):
    tensor = torch.ones(numel)
    dist.all_reduce(tensor)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    error = _failure_of(lambda: dist.all_reduce(tensor))
    return error.rank, error.op, str(error)


@pytest.mark.parametrize("numel", [1, 3_000_000])
@pytest.mark.parametrize("locality", ["", "0,1,2", "0,0,1"], ids=["one host", "three hosts", "two hosts"])
def test_a_killed_rank_is_named_by_all_survivors(run_ranks_collecting, numel, locality):
    outcomes = run_ranks_collecting(_killed, 3, numel, env={"MLSYS_LOCALITY": locality})
    assert outcomes[1].exitcode == -signal.SIGKILL
    for survivor in (outcomes[0], outcomes[2]):
        assert survivor.error is None, survivor.error
        culprit, operation, message = survivor.value
        assert culprit == 1
        assert "all_reduce" in operation
        assert "rank 1" in message


def _gone_before_a_new_group(rank, world_size, victim):
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    error = _failure_of(dist.new_group)
    return error.rank, error.op


@pytest.mark.parametrize("victim", [0, 2], ids=["the one that serves the store", "another one"])
@pytest.mark.parametrize("locality", ["", "0,1,2"], ids=["one host", "three hosts"])
def test_a_rank_that_is_killed_before_it_comes_to_a_new_group_is_named(
    run_ranks_collecting, locality, victim
):
    outcomes = run_ranks_collecting(_gone_before_a_new_group, 3, victim, env={"MLSYS_LOCALITY": locality})
    for survivor in {0, 1, 2} - {victim}:
        assert (outcomes[survivor].value, outcomes[survivor].error) == ((victim, "connecting"), None)


def _raising(rank, world_size):
    dist.barrier()
    if rank == 2:
        comm.poison("ValueError: no such token 7")
        return None
    error = _failure_of(lambda: dist.all_reduce(torch.ones(10)))
    return error.rank, error.cause


def test_a_rank_that_raises_tells_the_others_why(run_ranks):
    for culprit, cause in run_ranks(_raising, 3)[:2]:
        assert culprit == 2
        assert "no such token 7" in cause


def _point_to_point_peer_dies(rank, world_size):
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailedError) as caught:
        dist.recv(torch.empty(5), src=1)
    return caught.value.rank


def test_a_receive_from_a_killed_rank_names_it(run_ranks_collecting):
    outcomes = run_ranks_collecting(_point_to_point_peer_dies, 2)
    assert (outcomes[0].value, outcomes[0].error) == (1, None)


def _async_peer_dies(rank, world_size):
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    works = [dist.all_reduce(torch.ones(50_000), async_op=True) for _ in range(5)]
    future = works[-1].get_future()
    for work in works:
        with pytest.raises(PeerFailedError):
            work.wait()
    assert not works[0].is_success()
    with pytest.raises(PeerFailedError):
        future.wait()


def test_every_operation_under_way_fails_when_a_rank_is_killed(run_ranks_collecting):
    assert run_ranks_collecting(_async_peer_dies, 2)[0].error is None


def _dies_in_backward(rank, world_size):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(30, 30))
    model(torch.ones(2, 30)).sum().backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailedError) as caught:
        for _ in range(3):
            model(torch.ones(2, 30)).sum().backward()
    return caught.value.rank


def test_ddp_raises_the_named_error_out_of_backward(run_ranks_collecting):
    outcomes = run_ranks_collecting(_dies_in_backward, 2)
    assert (outcomes[0].value, outcomes[0].error) == (1, None)


def _left(rank, world_size):
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        return None
    with pytest.raises(PeerFailedError) as caught:
        dist.all_reduce(torch.ones(3))
    return caught.value.rank, caught.value.cause


def test_an_operation_with_a_rank_that_left_in_good_order_says_so(run_ranks):
    culprit, cause = run_ranks(_left, 2)[0]
    assert culprit == 1
    assert "left the group" in cause


def _last_barrier(rank, world_size):
    for _ in range(3):
        dist.all_reduce(torch.ones(100_000))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_may_leave_right_after_their_last_operation(run_ranks):
    for _ in range(5):
        run_ranks(_last_barrier, 4)


def _mismatch(rank, world_size, kind):
    calls = {
        "size": lambda: dist.all_reduce(torch.ones(10 + rank)),
        "dtype": lambda: dist.all_reduce(torch.ones(8, dtype=torch.float32 if rank else torch.int32)),
        "op": lambda: dist.all_reduce(torch.ones(8), op=dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM),
        "collective": lambda: dist.barrier() if rank else dist.all_reduce(torch.ones(8)),
        "root": lambda: dist.broadcast(torch.ones(8), src=rank),
    }
    with pytest.raises(CollectiveMismatchError) as caught:
        calls[kind]()
    return str(caught.value)


@pytest.mark.parametrize("kind", ["size", "dtype", "op", "collective", "root"])
def test_ranks_that_disagree_are_told_what_each_called(run_ranks, kind):
    for rank, message in enumerate(run_ranks(_mismatch, 2, kind)):
        assert f"rank {rank}" in message
        assert f"rank {1 - rank}" in message


def _late(rank, world_size):
    group = dist.new_group([0, 1], timeout=datetime.timedelta(milliseconds=300))
    dist.barrier(group=group)
    if rank == 0:
        with pytest.raises(CollectiveTimeoutError) as caught:
            dist.all_reduce(torch.ones(5), group=group)
        message = str(caught.value)
        dist.distributed_c10d._get_default_store().set("rank 0 gave up", "yes")
        return message
    dist.distributed_c10d._get_default_store().wait(["rank 0 gave up"])
    return None


def test_a_timeout_names_the_operation_and_the_rank_that_did_not_come(run_ranks):
    message = run_ranks(_late, 2)[0]
    assert "all_reduce" in message
    assert "rank 0" in message
    assert "1" in message.split("gave up", 1)[1]


def _waiting_less_than_the_operation(rank, world_size):
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    if rank == 1:
        store.wait(["rank 0 gave up"])
    tensor = torch.ones(5)
    work = dist.all_reduce(tensor, async_op=True)
    if rank == 0:
        with pytest.raises(CollectiveTimeoutError):
            work.wait(datetime.timedelta(milliseconds=50))
        store.set("rank 0 gave up", "yes")
    work.wait()
    assert (tensor == 2).all()


def test_a_wait_that_ends_early_does_not_harm_the_operation(run_ranks):
    run_ranks(_waiting_less_than_the_operation, 2)


def _stalled_barrier(rank, world_size):
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    message = None
    if rank == 0:
        with pytest.raises(RuntimeError, match="Rank 1") as caught:
            dist.group.WORLD.monitored_barrier(datetime.timedelta(milliseconds=200))
        message = str(caught.value)
        store.set("done", "yes")
    elif rank == 2:
        with pytest.raises(RuntimeError):
            dist.group.WORLD.monitored_barrier(datetime.timedelta(milliseconds=200))
    store.wait(["done"])
    return message


def test_a_monitored_barrier_names_the_first_rank_that_is_missing(run_ranks):
    assert "failed to pass monitoredBarrier" in run_ranks(_stalled_barrier, 3)[0]


def test_errors_survive_pickling_also_those_that_came_through_backward():
    from mlsys_engine.comm.carriers import carrier

    original = PeerFailedError(3, "node7", 41, "killed by signal 9", "all_reduce", 12)
    for error in (original, carrier(original)("whatever torch says")):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is PeerFailedError
        assert (copy.rank, copy.host, copy.pid, copy.sequence, str(copy)) == (
            3,
            "node7",
            41,
            12,
            str(original),
        )
