"""Our collectives against gloo's, interleaved in one run on the same ranks, every result checked.

    python benchmarks/collectives.py [--ranks 2 4] [--max-mib 64] [--seconds 0.3] [--json FILE]

Each rank joins one group of backend mlsys and one of gloo. For every case the contestants take turns round
by round: mlsys on arena memory, mlsys on private memory, gloo on private memory. The ceiling, timed in the
same rounds, is all ranks sweeping (reading and writing) their own buffer at once: no in-place all-reduce of
large buffers can be faster. The last table is about latency: a thousand calls of 1 KiB, also by `mls.comm`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import Case, Contestant, as_cell, as_size, as_time, machine, run_ranks, run_rounds, write_record
from rich.console import Console
from rich.table import Table

from mlsys_engine import comm

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
ARENA, PRIVATE, GLOO, SWEEP = "mlsys arena", "mlsys private", "gloo", "sweep"
DIRECT = "mls.comm"
SIZES = (256, 1 << 10, 16 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
LATENCY_BYTES, LATENCY_CALLS, CALLS_PER_TURN = 1 << 10, 1000, 20


class Buffers:
    """The tensors of one contestant for one operation, filled so that every result is known."""

    def __init__(self, operation: str, num_bytes: int, empty: Callable[[int], torch.Tensor]) -> None:
        self.operation = operation
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        numel = num_bytes // 4 // self.world_size * self.world_size
        self.whole, self.part = empty(numel), empty(numel // self.world_size)
        self.other = empty(numel) if operation == "all_to_all" else self.part

    def prepare(self) -> None:
        """Every element is this rank's number plus one."""
        for tensor in (self.whole, self.part, self.other):
            tensor.fill_(self.rank + 1.0)

    def call(self, group: dist.ProcessGroup) -> Callable[[], Any]:
        """The operation by torch.distributed."""
        whole, part, other = self.whole, self.part, self.other
        return {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "reduce_scatter": lambda: group._reduce_scatter_base(part, whole).wait(),
            "all_gather": lambda: group._allgather_base(whole, part).wait(),
            "broadcast": lambda: dist.broadcast(whole, 0, group=group),
            "all_to_all": lambda: dist.all_to_all_single(whole, other, group=group),
        }[self.operation]

    def check(self) -> None:
        """Raises when the result is wrong."""
        total = self.world_size * (self.world_size + 1) / 2
        by_rank = torch.arange(1.0, self.world_size + 1)[:, None]
        result = self.part if self.operation == "reduce_scatter" else self.whole.view(self.world_size, -1)
        expected = {"all_reduce": total, "reduce_scatter": total, "broadcast": 1.0}.get(
            self.operation, by_rank
        )
        if not (result == expected).all():
            raise AssertionError(f"wrong result of {self.operation} on rank {self.rank}")


def run_case(operation: str, num_bytes: int, gloo: dist.ProcessGroup, seconds: float) -> Case:
    """All contestants of one operation at one size."""
    arena, private = Buffers(operation, num_bytes, comm.empty), Buffers(operation, num_bytes, torch.zeros)
    native = dist.group.WORLD
    contestants = [
        Contestant(name=ARENA, call=arena.call(native), prepare=arena.prepare, check=arena.check),
        Contestant(name=PRIVATE, call=private.call(native), prepare=private.prepare, check=private.check),
        Contestant(name=GLOO, call=private.call(gloo), prepare=private.prepare, check=private.check),
        Contestant(name=SWEEP, call=lambda: private.whole.mul_(1.0), prepare=private.prepare),
    ]
    rounds, timings = run_rounds(contestants, seconds=seconds)
    return Case(
        operation=operation,
        world_size=dist.get_world_size(),
        bytes=arena.whole.nbytes,
        rounds=rounds,
        timings=timings,
    )


def run_latency(gloo: dist.ProcessGroup) -> Case:
    """A thousand all-reduces of 1 KiB by each contestant, 20 in a turn."""
    arena, private = (Buffers("all_reduce", LATENCY_BYTES, empty) for empty in (comm.empty, torch.zeros))
    native = dist.group.WORLD
    contestants = [
        Contestant(
            name=DIRECT,
            call=lambda: comm.all_reduce(private.whole),
            prepare=private.prepare,
            check=private.check,
        ),
        Contestant(name=ARENA, call=arena.call(native), prepare=arena.prepare, check=arena.check),
        Contestant(name=PRIVATE, call=private.call(native), prepare=private.prepare, check=private.check),
        Contestant(name=GLOO, call=private.call(gloo), prepare=private.prepare, check=private.check),
    ]
    rounds, timings = run_rounds(
        contestants,
        seconds=1e9,
        min_rounds=LATENCY_CALLS,
        max_rounds=LATENCY_CALLS,
        calls_per_turn=CALLS_PER_TURN,
    )
    return Case(
        operation="all_reduce",
        world_size=dist.get_world_size(),
        bytes=LATENCY_BYTES,
        rounds=rounds,
        timings=timings,
    )


def run_all(operations: list[str], max_bytes: int, seconds: float) -> tuple[list[Case], Case]:
    """What every rank runs: each operation at each size, then the latency."""
    gloo = dist.new_group(backend="gloo")
    sizes = [size for size in SIZES if size <= max_bytes]
    cases = [run_case(operation, size, gloo, seconds) for operation in operations for size in sizes]
    return cases, run_latency(gloo)


def sizes_table(cases: list[Case]) -> Table:
    table = Table(title=f"collectives on {machine()}: min / median (quartiles) of the slowest rank")
    names = (ARENA, PRIVATE, GLOO, SWEEP)
    for column in ("operation", "ranks", "size", *names, "arena : gloo", "private : gloo", "arena : sweep"):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for case in cases:
        cells = [as_cell(case.timings[name]) for name in names]
        cells += [f"{case.speedup(name, GLOO):.1f}x faster" for name in (ARENA, PRIVATE)]
        cells.append(f"{case.speedup(SWEEP, ARENA):.2f}x" if case.operation == "all_reduce" else "")
        table.add_row(case.operation, str(case.world_size), as_size(case.bytes), *cells)
    return table


def latency_table(cases: list[Case]) -> Table:
    table = Table(title=f"latency of an all-reduce of {as_size(LATENCY_BYTES)}, {LATENCY_CALLS} calls")
    for column in ("ranks", "by", "median", "quartiles", "than gloo"):
        table.add_column(column, justify="left" if column == "by" else "right")
    for case in cases:
        for name, timing in case.timings.items():
            table.add_row(
                str(case.world_size),
                name,
                f"{timing.median_s * 1e6:.1f} µs",
                f"{as_time(timing.quarter_s)} to {as_time(timing.three_quarters_s)}",
                f"{case.speedup(name, GLOO):.1f}x faster",
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--max-mib", type=float, default=64.0, help="largest buffer in MiB")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for the rounds of one case")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    max_bytes = int(arguments.max_mib * 2**20)
    by_size, latencies = [], []
    for world_size in arguments.ranks:
        cases, latency = run_ranks(run_all, world_size, arguments.operations, max_bytes, arguments.seconds)
        by_size += cases
        latencies.append(latency)
    console = Console(width=None if os.environ.get("COLUMNS") else 220)
    console.print(sizes_table(by_size))
    console.print(latency_table(latencies))
    if arguments.json:
        write_record(arguments.json, cases=by_size, latency=latencies)


if __name__ == "__main__":
    main()
