"""Seeded failures of one rank at a random moment, and what every survivor was told: when, whom, in what.

A rank fails by SIGKILL, by an exit without a word, by an exception (which it tells the others, as the
launcher's hook does) or by SIGSTOP for longer than the timeout. The victim's own timer thread does it, so
that it happens in the middle of whatever the rank is doing. All clocks are the machine's monotonic one, which
processes share.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.errors import CollectiveTimeoutError, PeerFailedError
from tests.support.ranks import run_ranks_collecting

TIMEOUT_S = 0.5  # of the groups in which a rank is stopped
PATIENCE_S = 20.0  # of the others: who finishes earlier learned of the failure itself
HANG_S = 30.0  # a rank that is not done by then writes its stacks, which become a complaint, and ends
LAYOUTS = {2: ["", "0,1"], 3: ["", "0,0,1", "0,1,2"], 4: ["", "0,0,1,1", "0,1,0,1", "0,1,2,3"]}
WAYS = ["kill", "kill", "exit", "raise", "stop"]
PHASES = [
    "before connecting",
    "while connecting",
    "small",
    "large",
    "arena",
    "asynchronous",
    "between",
    "point to point",
    "subgroup",
]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One failure: who, how, when, and where the ranks live (MLSYS_LOCALITY; empty: on one host)."""

    world_size: int
    victim: int
    way: str
    phase: str
    locality: str
    delay_s: float

    @classmethod
    def draw(cls, seed: int) -> Trial:
        choose = random.Random(f"kill {seed}")
        world_size = choose.choice([2, 3, 4])
        return cls(
            world_size=world_size,
            victim=choose.randrange(world_size),
            way=choose.choice(WAYS),
            phase=choose.choice(PHASES),
            locality=choose.choice(LAYOUTS[world_size]),
            delay_s=choose.uniform(0.0, 0.03),
        )

    @property
    def timeout_s(self) -> float:
        return TIMEOUT_S if self.way == "stop" else PATIENCE_S


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one survivor was told, and what it still held after leaving its groups."""

    error: str  # the class of the exception
    culprit: int  # as the exception's field says; -1 for a timeout, which only has a message
    operation: str
    message: str
    started_at: float  # the operation that failed
    raised_at: float
    leaked_descriptors: list[str]
    leaked_threads: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trial, the survivors' reports by rank, and what is wrong with them, in words."""

    trial: Trial
    reports: dict[int, Report]
    latency_s: float  # of the last survivor: after the failure, or after its own timeout when later
    complaints: list[str]


def run_trial(trial: Trial, folder: Path) -> Outcome:
    """Runs the trial; `folder` is empty and the trial's own."""
    continuing = threading.Thread(target=_continue_the_stopped, args=(trial, folder))
    if trial.way == "stop":
        continuing.start()
    results = run_ranks_collecting(
        _play,
        trial.world_size,
        trial,
        str(folder),
        timeout_s=HANG_S + 10.0,
        env={"MLSYS_LOCALITY": trial.locality},
    )
    if trial.way == "stop":
        continuing.join()
    complaints, reports = [], {}
    for rank, result in enumerate(results):
        if isinstance(result.value, Report):
            reports[rank] = result.value
            complaints += [f"rank {rank}: {text}" for text in _complaints(trial, rank, result.value)]
        elif rank != trial.victim or trial.way == "stop":
            complaints.append(
                f"rank {rank} ended with {result.exitcode}: {result.error or _stacks(folder, rank)}"
            )
    return Outcome(
        trial=trial, reports=reports, latency_s=_latency_s(trial, folder, reports), complaints=complaints
    )


def _stacks(folder: Path, rank: int) -> str:
    path = folder / f"stacks-{rank}"
    return path.read_text() if path.exists() else "it did not come to the trial"


def _latency_s(trial: Trial, folder: Path, reports: dict[int, Report]) -> float:
    if not (folder / "failed_at").exists():  # the trial ended before: there are complaints that say why
        return float("nan")
    failed_at = float((folder / "failed_at").read_text())
    late = [
        report.raised_at
        - (max(failed_at, report.started_at + TIMEOUT_S) if trial.way == "stop" else failed_at)
        for rank, report in reports.items()
        if rank != trial.victim
    ]
    return max(late, default=float("nan"))


def _complaints(trial: Trial, rank: int, report: Report) -> list[str]:
    complaints = []
    expected = "CollectiveTimeoutError" if trial.way == "stop" else "PeerFailedError"
    if report.error != expected:
        complaints.append(f"raised {report.error}, not {expected}: {report.message}")
    elif trial.way == "stop" and rank == trial.victim and "out of the group" not in report.message:
        complaints.append(f"was not told that it is out: {report.message}")
    elif trial.way == "stop" and f"rank {trial.victim}" not in report.message:
        complaints.append(f"does not name rank {trial.victim}: {report.message}")
    elif trial.way != "stop" and report.culprit != trial.victim:
        complaints.append(f"names rank {report.culprit}, not {trial.victim}: {report.message}")
    if not any(operation in report.message for operation in report.operation.split()):
        complaints.append(f"does not name {report.operation}: {report.message}")
    if report.leaked_descriptors:
        complaints.append(f"still holds {report.leaked_descriptors}")
    if report.leaked_threads:
        complaints.append(f"still has {report.leaked_threads} more threads")
    return complaints


def _continue_the_stopped(trial: Trial, folder: Path) -> None:
    """Wakes the stopped rank when all survivors have raised."""
    survivors = [folder / f"raised-{rank}" for rank in range(trial.world_size) if rank != trial.victim]
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline and not all(path.exists() for path in survivors):
        time.sleep(0.005)
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((folder / "victim").read_text()), signal.SIGCONT)


def _play(rank: int, world_size: int, trial: Trial, folder: str) -> Report:
    directory = Path(folder)
    stacks = (directory / f"stacks-{rank}").open("w")
    faulthandler.dump_traceback_later(HANG_S, exit=True, file=stacks)
    before = held()
    timeout = timedelta(seconds=trial.timeout_s)
    groups: list[dist.ProcessGroup] = []
    if trial.phase in ("before connecting", "while connecting"):
        operation = "connecting"

        def call() -> None:
            groups.append(dist.new_group(timeout=timeout))
    else:
        partner = (trial.victim + 1) % world_size
        pair = sorted([trial.victim, partner])
        groups += [dist.new_group(timeout=timeout), dist.new_group(pair, timeout=timeout)]
        in_pair = trial.phase == "subgroup" and rank in pair
        operation, call = _operation(trial, rank, groups[in_pair])
    if rank == trial.victim:
        (directory / "victim").write_text(str(os.getpid()))
        if trial.phase == "before connecting":
            _fail(trial, directory)  # returns when the rank was stopped and continued
        else:
            threading.Timer(trial.delay_s, _fail, (trial, directory)).start()
    report: dict[str, Any] = _call_until_it_fails(call)
    (directory / f"raised-{rank}").touch()
    if rank != trial.victim:
        _stay_until_all_have_raised(trial, directory)
    del call
    while groups:
        if (group := groups.pop()) is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
        del group
    gc.collect()
    descriptors, threads = _left_over(before)
    return Report(operation=operation, leaked_descriptors=descriptors, leaked_threads=threads, **report)


def _left_over(before: tuple[list[str], int]) -> tuple[list[str], int]:
    """What is held that was not before; rank 0 serves the store, whose other ends close in their time."""
    deadline = time.monotonic() + 5.0
    while True:
        descriptors, threads = held()
        more = sorted(set(descriptors) - set(before[0]))
        if (not more and threads <= before[1]) or time.monotonic() > deadline:
            return more, max(0, threads - before[1])
        time.sleep(0.01)


def _call_until_it_fails(call: Callable[[], object]) -> dict[str, Any]:
    while True:
        started_at = time.monotonic()
        try:
            call()
        except (PeerFailedError, CollectiveTimeoutError) as error:
            return {
                "error": type(error).__name__,
                "culprit": getattr(error, "rank", -1),
                "message": str(error),
                "started_at": started_at,
                "raised_at": time.monotonic(),
            }


def _stay_until_all_have_raised(trial: Trial, directory: Path) -> None:
    """A survivor that leaves earlier might be what another one sees first."""
    survivors = [directory / f"raised-{rank}" for rank in range(trial.world_size) if rank != trial.victim]
    deadline = time.monotonic() + HANG_S / 2
    while time.monotonic() < deadline and not all(path.exists() for path in survivors):
        time.sleep(0.001)


def _operation(trial: Trial, rank: int, group: dist.ProcessGroup) -> tuple[str, Callable[[], object]]:
    """What the rank does again and again, and the names by which errors may call it."""
    if trial.phase == "point to point":
        return "recv send", lambda: _exchange_with_neighbours(rank, trial.world_size, group)
    if trial.phase == "arena":
        shared = comm.empty(1_000_000, group=group)
        return "all_reduce", lambda: dist.all_reduce(shared, group=group)
    numel = {"large": 3_000_000, "asynchronous": 50_000}.get(trial.phase, 100)
    tensor = torch.ones(numel)
    if trial.phase == "asynchronous":
        return "all_reduce", lambda: _several_at_once(tensor, group)
    if trial.phase == "between":
        return "all_reduce", lambda: (torch.ones(200_000).cumsum(0), dist.all_reduce(tensor, group=group))
    return "all_reduce", lambda: dist.all_reduce(tensor, group=group)


def _several_at_once(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    works = [dist.all_reduce(tensor.clone(), group=group, async_op=True) for _ in range(4)]
    for work in works:
        work.wait()


def _exchange_with_neighbours(rank: int, world_size: int, group: dist.ProcessGroup) -> None:
    sent, received = torch.ones(20_000), torch.empty(20_000)
    work = dist.isend(sent, (rank + 1) % world_size, group=group)
    dist.recv(received, (rank - 1) % world_size, group=group)
    work.wait()


def _fail(trial: Trial, directory: Path) -> None:
    draft = directory / "failed_at.draft"
    draft.write_text(repr(time.monotonic()))
    draft.rename(directory / "failed_at")
    if trial.way == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.way == "exit":
        os._exit(3)
    if trial.way == "raise":
        comm.poison("ValueError: a seeded mistake")
        os._exit(1)
    os.kill(os.getpid(), signal.SIGSTOP)


def held() -> tuple[list[str], int]:
    """What this process's descriptors are, and how many threads it has."""
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors.append(os.readlink(f"/proc/self/fd/{name}"))
    return descriptors, len(os.listdir("/proc/self/task"))
