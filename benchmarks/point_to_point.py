"""Messages between two ranks of one host against gloo: a ball sent back and forth, from 1 KiB to 16 MiB.

    python benchmarks/point_to_point.py --json point_to_point.json

A call is one rally of `send` and `recv` there and back; results are checked. The arena's tensor is copied by
the receiver out of the sender's shared memory, the private one out of its process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from contest import Case, Contestant, as_cell, as_size, machine, run_ranks, run_rounds, write_record
from rich.console import Console
from rich.table import Table

from mlsys_engine import comm

SIZES = (2**10, 2**16, 2**20, 2**24)
ARENA, PRIVATE, GLOO = "mlsys, arena", "mlsys, private", "gloo"


def rally(ball: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], None]:
    """There and back: rank 0 serves."""

    def call() -> None:
        if dist.get_rank() == 0:
            dist.send(ball, 1, group=group)
            dist.recv(ball, 1, group=group)
        else:
            dist.recv(ball, 0, group=group)
            dist.send(ball, 0, group=group)

    return call


def contestant(name: str, ball: torch.Tensor, group: dist.ProcessGroup) -> Contestant:
    """Rank 0 serves a ball of ones; rank 1's own is of zeros before."""

    def prepare() -> None:
        ball.fill_(float(dist.get_rank() == 0))

    def check() -> None:
        assert bool((ball == 1).all())

    return Contestant(name=name, call=rally(ball, group), prepare=prepare, check=check)


def run_case(num_bytes: int, gloo: dist.ProcessGroup, seconds: float) -> Case:
    native = dist.group.WORLD
    numel = num_bytes // 4
    contestants = [
        contestant(ARENA, comm.empty(numel), native),
        contestant(PRIVATE, torch.zeros(numel), native),
        contestant(GLOO, torch.zeros(numel), gloo),
    ]
    rounds, timings = run_rounds(contestants, seconds=seconds)
    return Case(operation="send and recv", world_size=2, bytes=num_bytes, rounds=rounds, timings=timings)


def run_all(seconds: float) -> list[Case]:
    """What both ranks run."""
    gloo = dist.new_group(backend="gloo")
    return [run_case(size, gloo, seconds) for size in SIZES]


def show(cases: list[Case]) -> None:
    table = Table(title=f"a message there and back on {machine()}: min / median (quartiles)")
    for column in ("size", ARENA, PRIVATE, GLOO, "arena : gloo", "private : gloo"):
        table.add_column(column, justify="right")
    for case in cases:
        cells = [as_cell(case.timings[name]) for name in (ARENA, PRIVATE, GLOO)]
        ratios = [f"{case.speedup(name, GLOO):.1f}x faster" for name in (ARENA, PRIVATE)]
        table.add_row(as_size(case.bytes), *cells, *ratios)
    Console(width=None if os.environ.get("COLUMNS") else 160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of one size")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    cases = run_ranks(run_all, 2, arguments.seconds)
    show(cases)
    if arguments.json:
        write_record(arguments.json, cases=cases)


if __name__ == "__main__":
    main()
