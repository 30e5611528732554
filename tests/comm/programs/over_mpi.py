"""Runs every operation over two faked hosts, loses a rank, and goes on; each rank writes what it saw.

Started by an mpirun that lets the survivors live, with MLSYS_TRANSPORT=mpi and the folder for the reports
as the first argument. Values are small whole numbers, so that sums are exact in any order.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import mlsys_engine as mls
from mlsys_engine import comm
from tests.comm.operations import MOVING, REDUCING
from tests.support.no_gloo import forbid_gloo

CULPRIT = 2
PARTS = (1, 37, 200_003)  # elements; the largest makes messages of several pieces


def value_of(member: int, numel: int) -> torch.Tensor:
    return (torch.arange(numel) % 13 + member).float()


def check_operations(group: dist.ProcessGroup) -> None:
    mine, size = group.rank(), group.size()
    for numel in PARTS:
        total = sum(value_of(member, numel * size) for member in range(size))
        for name, reduce in REDUCING.items():
            result, part = reduce(value_of(mine, numel * size), dist.ReduceOp.SUM, group)
            expected = total if part is None else total[numel * part : numel * (part + 1)]
            assert result is None or torch.equal(result, expected), (name, numel)
        for name, move in MOVING.items():
            for member, got in move(value_of(mine, numel), group).items():
                assert torch.equal(got, value_of(member, numel)), (name, numel, member)


def check_messages(rank: int, world_size: int) -> None:
    """Many in both directions at once, of all sizes, and some that nobody waits for."""
    sizes = (0, 1, 5_000, 16_384, 16_385, 131_072, 1_000_001)
    peers = [peer for peer in range(world_size) if peer != rank]
    received = {(peer, numel): torch.full((numel,), -1.0) for peer in peers for numel in sizes}
    waiting = [dist.irecv(into, peer, tag=numel % 7) for (peer, numel), into in received.items()]
    for peer in peers:
        waiting += [dist.isend(value_of(rank, numel), peer, tag=numel % 7) for numel in sizes]
        dist.isend(torch.full((30_000,), float(rank)), peer, tag=99)  # its Work is dropped at once
    for work in waiting:
        assert work is not None
        work.wait()
    for (peer, numel), got in received.items():
        assert torch.equal(got, value_of(peer, numel)), (peer, numel)
    for peer in peers:
        got = torch.empty(30_000)
        dist.recv(got, peer, tag=99)
        assert (got == peer).all()


def lose_a_rank(rank: int) -> dict[str, object]:
    tensor = torch.ones(500_000)
    pids: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if rank == CULPRIT:
        dist.all_reduce(tensor)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            dist.all_reduce(tensor)
    except comm.PeerFailedError as failure:
        return {"named": failure.rank, "right_pid": failure.pid == pids[CULPRIT], "cause": failure.cause}


def main() -> None:
    forbid_gloo()
    world = mls.init(timeout_s=60)
    check_operations(dist.group.WORLD)
    check_messages(world.rank, world.world_size)
    for members in ([0, 2, 3], [1, 2]):
        group = dist.new_group(members)
        if world.rank in members:
            check_operations(group)
    counted = comm.counters()
    report: dict[str, object] = {
        "transports": comm.describe_transports(),
        "tcp_bytes": counted.tcp_bytes_sent + counted.tcp_bytes_received,
        "mpi_bytes_sent": counted.mpi_bytes_sent,
        "mpi_bytes_received": counted.mpi_bytes_received,
    }
    dist.barrier()
    report |= lose_a_rank(world.rank)
    world = comm.reconfigure()
    check_operations(dist.group.WORLD)
    report |= {"later_size": world.world_size, "later_transports": comm.describe_transports()}
    report["later_tcp_bytes"] = comm.counters().tcp_bytes_sent
    dist.barrier()
    dist.destroy_process_group()
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(report))
    os._exit(0)  # MPI_Finalize would wait for the dead rank


main()
