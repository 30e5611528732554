"""A crowd at the doors of a training: the losses are those of an undisturbed one, and nothing piles up."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from tests.support.hostile import Crowd, listeners_of_this_process

STEPS = 40
MOST_PENDING = 64  # handshakes at one listener (csrc/comm/auth/acceptor.h)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _train(rank: int, world_size: int, num_knocks: int) -> tuple[list[float], int, int, float, int]:
    """Losses; then descriptors and MiB that were added at most; then how many were turned away.

    Rank 0 also plays the crowd, on a thread: it calls both ranks' listeners.
    """
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    message, got = torch.full((1000,), float(rank)), torch.empty(1000)

    def exchange() -> None:
        work = dist.isend(message, 1 - rank)
        dist.recv(got, 1 - rank)
        work.wait()

    exchange()
    doors: list[list[object]] = [[], []]
    dist.all_gather_object(doors, listeners_of_this_process())
    crowd = Crowd([door for part in doors for door in part], group=dist.group.WORLD.group_name, size=2)
    knocking = threading.Thread(target=crowd.knock, args=(num_knocks if rank == 0 else 0,))
    losses, descriptors, resident = [], [len(os.listdir("/proc/self/fd"))], [_resident_mib()]
    knocking.start()
    steps = 0
    going_on = torch.ones(1)
    while going_on.item():
        data = torch.randn(16, 64, generator=torch.Generator().manual_seed(1000 * steps + rank))
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        optimizer.step()
        exchange()
        losses.append(loss.item())
        steps += 1
        descriptors.append(len(os.listdir("/proc/self/fd")))
        resident.append(_resident_mib())
        going_on.fill_(float(knocking.is_alive() or steps < STEPS))
        dist.broadcast(going_on, 0)
    knocking.join()
    crowd.close()
    dist.barrier()
    more_mib = max(resident) - resident[STEPS // 4]
    return (
        losses[:STEPS],
        max(descriptors) - descriptors[0],
        len([door for door in doors[rank]]),
        more_mib,
        comm.counters().strangers,
    )


def _check(run_ranks, num_knocks: int, locality: str) -> None:
    variables = {"MLSYS_LOCALITY": locality, "GLOG_minloglevel": "2"}
    quiet = run_ranks(_train, 2, 0, env=variables)
    crowded = run_ranks(_train, 2, num_knocks, env=variables, timeout_s=300.0)
    for rank in range(2):
        losses, descriptors, num_doors, more_mib, turned_away = crowded[rank]
        assert losses == quiet[rank][0]
        # Rank 0 holds the crowd's own ends as well.
        allowed = num_doors * MOST_PENDING + (210 if rank == 0 else 0)
        assert descriptors <= allowed
        assert more_mib < 64, more_mib
        assert turned_away > 0
        assert quiet[rank][4] == 0


@pytest.mark.slow
@pytest.mark.parametrize("locality", ["", "0,1"], ids=["one host", "two hosts"])
def test_a_crowd_at_the_doors_does_not_change_the_losses(run_ranks, locality):
    _check(run_ranks, 700, locality)


@pytest.mark.soak
@pytest.mark.parametrize("locality", ["", "0,1"], ids=["one host", "two hosts"])
def test_ten_thousand_strangers_do_not_change_the_losses(run_ranks, locality):
    _check(run_ranks, 10_000, locality)
