"""Fixes how many threads and which CPUs a rank has, alike under every launcher.

Open MPI binds each rank to a core, torchrun sets OMP_NUM_THREADS=1, Hydra does neither; the number of threads
changes the order of summation inside kernels, and so the last bit of the losses.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from mlsys_engine.errors import LaunchError

_CGROUPS = Path("/sys/fs/cgroup")


def fix_affinity(env: Mapping[str, str], *, launched: bool) -> tuple[int, ...]:
    """Releases all threads of a launched process from the launcher's binding; returns the CPUs it may use.

    Every CPU is asked for and the kernel grants those of the job's cgroup. A process that nobody launched, or
    one with MLSYS_AFFINITY=keep, stays where its user put it (taskset).
    """
    choice = env.get("MLSYS_AFFINITY", "release")
    if choice not in {"release", "keep"}:
        raise LaunchError(
            f"MLSYS_AFFINITY={choice!r}.",
            'It is "release" (the default: use every CPU of the job\'s cgroup) or "keep" (stay where bound).',
            "Type: unset MLSYS_AFFINITY",
        )
    if not hasattr(os, "sched_setaffinity"):
        return tuple(range(os.cpu_count() or 1))
    if launched and choice == "release":
        every_cpu = range(os.sysconf("SC_NPROCESSORS_CONF"))
        for thread in _thread_ids():
            with contextlib.suppress(OSError):  # a thread that has just ended, or a sandbox that forbids it
                os.sched_setaffinity(thread, every_cpu)
    return tuple(sorted(os.sched_getaffinity(0)))


def fix_threads(env: Mapping[str, str], *, num_cpus: int, local_size: int) -> int:
    """Sets and returns torch's intra-operator threads: MLSYS_NUM_THREADS, or an equal share of the CPUs."""
    asked = env.get("MLSYS_NUM_THREADS")
    if asked is not None and not (asked.isdigit() and int(asked) > 0):
        raise LaunchError(
            f"MLSYS_NUM_THREADS={asked!r}.",
            "It must be a whole number, 1 or more.",
            f"Type: export MLSYS_NUM_THREADS={max(1, num_cpus // local_size)}   (or unset it)",
        )
    num_threads = int(asked) if asked is not None else max(1, num_cpus // local_size)
    torch.set_num_threads(num_threads)
    return num_threads


def usable_cpus(affinity: tuple[int, ...]) -> int:
    """The number of CPUs worth of time that this process can get: its affinity, less when a quota says so."""
    return max(1, min(len(affinity), cpu_quota()))


def cpu_quota(cgroups: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs granted by the cgroup's cpu.max (version 2), rounded up; a huge number when there is no limit."""
    no_limit = 1 << 20
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return no_limit
    below = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    folder = cgroups / below
    quota = no_limit
    for place in [folder, *folder.parents]:
        if cgroups not in (place, *place.parents):
            break
        with contextlib.suppress(OSError, ValueError):
            granted, _, period = (place / "cpu.max").read_text().partition(" ")
            if granted != "max":
                quota = min(quota, math.ceil(int(granted) / int(period)))
    return quota


def _thread_ids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return [0]
