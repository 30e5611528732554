"""Our collectives against gloo's, interleaved in one run on the same ranks, every result checked.

    python benchmarks/collectives.py [--ranks 2 4] [--max-mib 64] [--seconds 0.3] [--json FILE]

Each rank joins one group of backend mlsys and one of gloo. For every case the contestants take turns round
by round: mlsys on arena memory, mlsys on private memory, gloo on private memory. A round is one call after a
barrier; its time is the slowest rank's. The ceiling, timed in the same rounds, is all ranks sweeping (reading
and writing) their own buffer at once: no in-place all-reduce of large buffers can be faster.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from mlsys_engine import comm
from mlsys_engine.telemetry import describe_hardware

OPERATIONS = ("all_reduce", "broadcast", "all_gather", "reduce_scatter")
CONTESTANTS = ("mlsys arena", "mlsys private", "gloo", "sweep")
SMALLEST_BYTES, FACTOR = 256, 8
MIN_ROUNDS, MAX_ROUNDS = 7, 200


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contestant over all rounds of a case."""

    minimum_s: float
    median_s: float
    quarter_s: float  # a quarter of the rounds were faster
    three_quarters_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        quarters = statistics.quantiles(seconds, n=4)
        return cls(
            minimum_s=min(seconds), median_s=quarters[1], quarter_s=quarters[0], three_quarters_s=quarters[2]
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation on `bytes`, the size of the largest buffer a rank passes, at one world size."""

    operation: str
    world_size: int
    bytes: int
    rounds: int
    timings: dict[str, Timing]

    def ratio_to_gloo(self, contestant: str) -> float:
        """How many times faster than gloo, by the medians."""
        return self.timings["gloo"].median_s / self.timings[contestant].median_s


def sizes(max_mib: float) -> list[int]:
    """256 B, then eight times more each, up to `max_mib`, which is always the last."""
    largest, listed, size = int(max_mib * 2**20), [], SMALLEST_BYTES
    while size < largest:
        listed.append(size)
        size *= FACTOR
    return [*listed, largest]


class Contest:
    """The buffers and calls of one operation at one size on this rank."""

    def __init__(self, operation: str, num_bytes: int, gloo: dist.ProcessGroup) -> None:
        self.operation, self.gloo = operation, gloo
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.numel = num_bytes // 4 // self.world_size * self.world_size
        self.part = self.numel // self.world_size
        self.arena = comm.empty(self.numel), comm.empty(self.part)
        self.private = torch.zeros(self.numel), torch.zeros(self.part)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """What each contestant does in a round."""
        swept = self.private[0]
        return {
            "mlsys arena": self._call(*self.arena, dist.group.WORLD),
            "mlsys private": self._call(*self.private, dist.group.WORLD),
            "gloo": self._call(*self.private, self.gloo),
            "sweep": lambda: swept.mul_(1.0),
        }

    def _call(self, whole: torch.Tensor, part: torch.Tensor, group: Any) -> Callable[[], Any]:
        return {
            "all_reduce": lambda: dist.all_reduce(whole, group=group),
            "broadcast": lambda: dist.broadcast(whole, 0, group=group),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        }[self.operation]

    def prepare(self, contestant: str) -> None:
        """Fills the buffers with this rank's number plus one, so that every result is known."""
        whole, part = self.arena if contestant == "mlsys arena" else self.private
        whole.fill_(self.rank + 1.0)
        part.fill_(self.rank + 1.0)

    def check(self, contestant: str) -> None:
        """Raises when the call before did not leave the right result."""
        whole, part = self.arena if contestant == "mlsys arena" else self.private
        total = self.world_size * (self.world_size + 1) / 2
        numbers = torch.arange(1.0, self.world_size + 1)
        right = {
            "all_reduce": lambda: bool((whole == total).all()),
            "broadcast": lambda: bool((whole == 1.0).all()),
            "all_gather": lambda: (
                torch.equal(whole.view(self.world_size, -1)[:, 0], numbers)
                and bool((whole.view(self.world_size, -1) == numbers[:, None]).all())
            ),
            "reduce_scatter": lambda: bool((part == total).all()),
        }[self.operation]()
        if contestant != "sweep" and not right:
            raise AssertionError(f"{contestant}: wrong result of {self.operation} on rank {self.rank}")


def run_case(operation: str, num_bytes: int, gloo: dist.ProcessGroup, seconds: float) -> Case:
    """Rounds of all contestants in turn until `seconds` have passed on rank 0."""
    contest = Contest(operation, num_bytes, gloo)
    calls, spent = contest.calls(), {name: [] for name in CONTESTANTS}
    slowest, go_on = torch.zeros(len(CONTESTANTS), dtype=torch.float64), torch.ones(1)
    begin, round_number = time.perf_counter(), 0
    while go_on.item():
        order = (
            CONTESTANTS[round_number % len(CONTESTANTS) :] + CONTESTANTS[: round_number % len(CONTESTANTS)]
        )
        for name in order:
            contest.prepare(name)
            dist.barrier()
            start = time.perf_counter()
            calls[name]()
            slowest[CONTESTANTS.index(name)] = time.perf_counter() - start
            contest.check(name)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if round_number:  # the first warms up: connections, page faults, self-tuning
            for name, value in zip(CONTESTANTS, slowest.tolist(), strict=True):
                spent[name].append(value)
        round_number += 1
        late = time.perf_counter() - begin > seconds or round_number > MAX_ROUNDS
        go_on.fill_(0.0 if late and round_number > MIN_ROUNDS else 1.0)
        dist.broadcast(go_on, 0)
    return Case(
        operation=operation,
        world_size=contest.world_size,
        bytes=contest.numel * 4,
        rounds=round_number - 1,
        timings={name: Timing.of(values) for name, values in spent.items()},
    )


def rank_main(rank: int, world_size: int, port: int, arguments: argparse.Namespace, results: Any) -> None:
    """One rank: all cases at one world size; rank 0 hands the results back."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("mlsys", rank=rank, world_size=world_size)
    gloo = dist.new_group(backend="gloo")
    cases = [
        run_case(operation, size, gloo, arguments.seconds)
        for operation in arguments.operations
        for size in sizes(arguments.max_mib)
    ]
    if rank == 0:
        results.put(cases)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(world_size: int, arguments: argparse.Namespace) -> list[Case]:
    """Starts the ranks and waits for rank 0's cases."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=rank_main, args=(rank, world_size, port, arguments, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    cases: list[Case] = []
    while not cases:
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed; its traceback is above")
        if not results.empty():
            cases = results.get()
        time.sleep(0.05)
    for process in processes:
        process.join()
    return cases


def as_time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms"


def as_cell(timing: Timing) -> str:
    quarters = f"{as_time(timing.quarter_s)} to {as_time(timing.three_quarters_s)}"
    return f"{as_time(timing.minimum_s)} / {as_time(timing.median_s)}\n({quarters})"


def as_size(num_bytes: int) -> str:
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes} B"


def show(cases: list[Case], hardware: dict[str, Any]) -> None:
    """The table: minimum, median and quartiles of each contestant, and the ratios."""
    table = Table(title=f"collectives on {describe(hardware)}: min / median (quartiles) of the slowest rank")
    for column in (
        "operation",
        "ranks",
        "size",
        *CONTESTANTS,
        "arena : gloo",
        "private : gloo",
        "arena : sweep",
    ):
        table.add_column(column, justify="left" if column == "operation" else "right")
    for case in cases:
        columns = [as_cell(case.timings[name]) for name in CONTESTANTS]
        sweep = case.timings["mlsys arena"].median_s / case.timings["sweep"].median_s
        ratios = [f"{case.ratio_to_gloo(name):.1f}x faster" for name in CONTESTANTS[:2]]
        columns += [*ratios, f"{sweep:.1f}x slower" if case.operation == "all_reduce" else ""]
        table.add_row(case.operation, str(case.world_size), as_size(case.bytes), *columns)
    Console(width=None if os.environ.get("COLUMNS") else 220).print(table)


def describe(hardware: dict[str, Any]) -> str:
    return f"{hardware.get('cpu', platform.processor())}, {os.cpu_count()} CPUs, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--max-mib", type=float, default=64.0, help="largest buffer in MiB")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for the rounds of one case")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    hardware = describe_hardware()
    cases = [case for world_size in arguments.ranks for case in run_ranks(world_size, arguments)]
    show(cases, hardware)
    if arguments.json:
        record = {"hardware": hardware, "torch": torch.__version__, "cases": [asdict(case) for case in cases]}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
