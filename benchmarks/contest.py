"""Interleaved timing over several ranks: every contestant takes its turn in every round, on the same ranks.

A round gives each contestant one call, after a barrier outside the timing; a call's time is the slowest
rank's. The order of turns rotates from round to round, so that nobody always runs after the same other. What
a call left behind is checked on every rank, outside the timing. Absolute times on a shared machine wander;
ratios of medians taken this way do not.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine.telemetry import code_version, describe_hardware


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contestant over all rounds of a case."""

    minimum_s: float
    median_s: float
    quarter_s: float  # a quarter of the rounds were faster
    three_quarters_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        quarters = statistics.quantiles(seconds, n=4)
        return cls(
            minimum_s=min(seconds), median_s=quarters[1], quarter_s=quarters[0], three_quarters_s=quarters[2]
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One contest: what was done, on how many bytes (of the largest buffer of a rank), by how many ranks."""

    operation: str
    world_size: int
    bytes: int
    rounds: int
    timings: dict[str, Timing]

    def speedup(self, contestant: str, over: str) -> float:
        """How many times faster than `over`, by the medians."""
        return self.timings[over].median_s / self.timings[contestant].median_s


def nothing() -> None:
    """For contestants that need no preparation, or leave nothing to check."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """`prepare` and `check` run outside the timing; `check` raises when `call` left a wrong result."""

    name: str
    call: Callable[[], Any]
    prepare: Callable[[], Any] = nothing
    check: Callable[[], Any] = nothing


def run_rounds(
    contestants: Sequence[Contestant],
    *,
    seconds: float,
    min_rounds: int = 7,
    max_rounds: int = 200,
    between: Callable[[], Any] = dist.barrier,
    calls_per_turn: int = 1,
) -> tuple[int, dict[str, Timing]]:
    """Rounds until `seconds` have passed on rank 0; called on every rank. Returns the calls, and their times.

    Several calls in a turn, each timed by itself, are for latencies: the first call after another contestant
    finds that one's data in the caches, and its threads awake.
    """
    spent: list[list[float]] = []
    go_on, begin = torch.ones(1), time.perf_counter()
    while go_on.item():
        turn = len(spent) // calls_per_turn % len(contestants)
        taken = [[0.0] * len(contestants) for _ in range(calls_per_turn)]
        for index in (*range(turn, len(contestants)), *range(turn)):
            contestant = contestants[index]
            for row in taken:
                contestant.prepare()
                between()
                start = time.perf_counter()
                contestant.call()
                row[index] = time.perf_counter() - start
                between()  # with fewer cores than ranks, a check would delay those still in the call
                contestant.check()
        spent += taken
        over = time.perf_counter() - begin > seconds or len(spent) > max_rounds
        go_on.fill_(0.0 if over and len(spent) > min_rounds else 1.0)
        dist.broadcast(go_on, 0)
    # The first round warms up: connections, page faults, self-tuning.
    slowest = torch.tensor(spent[calls_per_turn:], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    by_name = zip((contestant.name for contestant in contestants), slowest.T.tolist(), strict=True)
    return len(slowest), {name: Timing.of(values) for name, values in by_name}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank_main(
    program: Callable[..., Any], place: tuple[int, int, int], arguments: Any, results: Any
) -> None:
    rank, world_size, port = place
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("mlsys", rank=rank, world_size=world_size)
    result = program(*arguments)
    if rank == 0:
        results.put(result)
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(program: Callable[..., Any], world_size: int, *arguments: Any) -> Any:
    """Runs a module-level function on new ranks in a group of backend mlsys; returns rank 0's result."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(
            target=_rank_main, args=(program, (rank, world_size, port), arguments, results), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    while results.empty():
        if any(process.exitcode for process in processes):
            raise SystemExit("a rank failed; its traceback is above")
        time.sleep(0.05)
    result = results.get()
    for process in processes:
        process.join()
    return result


class _Allocations(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                     "fordblks", "keepcost")
    ]  # fmt: skip


def allocated_bytes() -> int:
    """What the process has allocated and not freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Allocations
    found = mallinfo2()
    return int(found.hblkhd + found.uordblks)


def as_time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms"


def as_cell(timing: Timing) -> str:
    """Minimum / median, and below them the quartiles."""
    quarters = f"{as_time(timing.quarter_s)} to {as_time(timing.three_quarters_s)}"
    return f"{as_time(timing.minimum_s)} / {as_time(timing.median_s)}\n({quarters})"


def as_size(num_bytes: int) -> str:
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.4g} {unit}"
    return f"{num_bytes} B"


def machine() -> str:
    """The hardware in a few words, for titles."""
    cpu = describe_hardware().get("cpu", platform.processor())
    return f"{cpu}, {os.cpu_count()} CPUs, torch {torch.__version__}"


def write_record(path: Path, **parts: Any) -> None:
    """Writes results as JSON together with what they were measured on."""
    code = code_version()
    record = {
        "date": date.today().isoformat(),
        "commit": code.get("commit"),
        "dirty": code.get("dirty"),
        "hardware": describe_hardware(),
        "torch": torch.__version__,
        **parts,
    }
    path.write_text(json.dumps(record, indent=1, default=asdict) + "\n")
