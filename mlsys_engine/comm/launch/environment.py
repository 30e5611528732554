"""Reads the launcher's variables: who started this process, and as which rank of how many.

`detect` is a pure function of a dictionary, so every launcher is tested without being run. Precedence: the
launcher that certainly started this very process comes first (our own, then torchrun, which marks its
children); MPI launchers next; Slurm last, since its variables are inherited by everything inside an
allocation, by a `torchrun` or `mpirun` that srun started for instance.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlsys_engine.errors import LaunchError

MPI_LAUNCHERS = ("openmpi", "mpich")


class SharedLaunchError(LaunchError):
    """A contradiction that every rank of the job meets alike, so that it is enough if rank 0 tells it."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What the variables say about this process. None: they do not say."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None = None
    local_size: int | None = None
    address: str | None = None
    port: int | None = None


@dataclass(frozen=True, kw_only=True)
class Variables:
    """The names under which one family of launchers passes a rank its place."""

    started_by: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str


FAMILIES = {
    "env": Variables(
        started_by="torchrun, or by hand",
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_size="LOCAL_WORLD_SIZE",
    ),
    "openmpi": Variables(
        started_by="mpirun of Open MPI",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": Variables(
        started_by="mpirun of MPICH or Intel MPI",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_size="MPI_LOCALNRANKS",
    ),
    "slurm": Variables(
        started_by="srun",
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_size="SLURM_STEP_TASKS_PER_NODE",
    ),
}


def detect(env: Mapping[str, str]) -> Placement:
    """This process's place according to its environment; launcher "single" when nobody started it.

    Raises LaunchError when variables are missing, malformed or contradict each other.
    """
    by_hand = _read(env, "env")
    if by_hand is not None and env.get("MLSYS_LAUNCHER") == "local":
        return _with_master(env, by_hand, "local")
    if by_hand is not None and env.get("TORCHELASTIC_RUN_ID"):
        return _with_master(env, by_hand, "torchrun")
    under_mpi = [placement for name in MPI_LAUNCHERS if (placement := _read(env, name)) is not None]
    if len(under_mpi) > 1:
        _refuse_disagreement(*under_mpi)
    under_slurm = _read_slurm(env)
    if by_hand is not None:
        for other in [*under_mpi, *([under_slurm] if under_slurm and under_slurm.world_size > 1 else [])]:
            _refuse_disagreement(by_hand, other)
        if env.get("MASTER_ADDR") or not under_mpi:
            return _with_master(env, by_hand, "env")
    if under_mpi:
        same_step = under_slurm is not None and _agree(under_mpi[0], under_slurm)
        chosen = under_slurm if same_step and under_slurm is not None else under_mpi[0]
        return _with_master(env, chosen, chosen.launcher)
    if under_slurm is not None:
        return _with_master(env, under_slurm, "slurm")
    return Placement(launcher="single", rank=0, world_size=1, local_rank=0, local_size=1)


def launched(env: Mapping[str, str]) -> bool:
    """Whether a launcher started this process, so that it must join a job and not start ranks of its own.

    A one-task Slurm step does not count: it may as well be somebody's interactive shell.
    """
    try:
        placement = detect(env)
    except LaunchError:
        return True
    return placement.launcher != "single" and (placement.launcher, placement.world_size) != ("slurm", 1)


def unused_slurm_tasks(env: Mapping[str, str]) -> int:
    """Number of tasks of a batch allocation that a process not started by srun leaves idle; 0 elsewhere."""
    if env.get("SLURM_STEP_ID") or not env.get("SLURM_JOB_ID"):
        return 0
    tasks = env.get("SLURM_NTASKS", "1")
    return int(tasks) if tasks.isdigit() and int(tasks) > 1 else 0


def _read(env: Mapping[str, str], name: str) -> Placement | None:
    family = FAMILIES[name]
    present = [key for key in (family.rank, family.world_size) if env.get(key)]
    if not present:
        return None
    if len(present) == 1:
        missing = family.world_size if present[0] == family.rank else family.rank
        raise LaunchError(
            f"{present[0]}={env[present[0]]} is set but {missing} is not.",
            f"A process started by {family.started_by} has both, or neither when it runs alone.",
            f"Type: unset {present[0]}   (to run alone), or start the job with torchrun, mpirun or srun.",
        )
    placement = Placement(
        launcher=name,
        rank=_whole_number(env, family.rank, least=0),
        world_size=_whole_number(env, family.world_size, least=1),
        local_rank=_optional_number(env, family.local_rank, least=0),
        local_size=_optional_number(env, family.local_size, least=1) if name != "slurm" else None,
    )
    _check_ranges(family, placement)
    return placement


def _check_ranges(family: Variables, placement: Placement) -> None:
    if placement.rank >= placement.world_size:
        raise LaunchError(
            f"{family.rank}={placement.rank} with {family.world_size}={placement.world_size}.",
            f"Ranks count from 0 to {placement.world_size - 1}.",
            f"Start {placement.world_size} processes with ranks 0 to {placement.world_size - 1}, "
            f"or raise {family.world_size}.",
        )
    local_size = placement.local_size
    if local_size is not None and local_size > placement.world_size:
        raise LaunchError(
            f"{family.local_size}={local_size} with {family.world_size}={placement.world_size}.",
            "One host cannot hold more ranks than the job has.",
            f"Correct {family.local_size}, or unset it and it is counted from the host names.",
        )
    if local_size is not None and placement.local_rank is not None and placement.local_rank >= local_size:
        raise LaunchError(
            f"{family.local_rank}={placement.local_rank} with {family.local_size}={local_size}.",
            f"Local ranks count from 0 to {local_size - 1}.",
            f"Correct {family.local_rank}, or unset both and they are counted from the host names.",
        )


def _read_slurm(env: Mapping[str, str]) -> Placement | None:
    """A rank started by srun. A batch script has SLURM_PROCID too, but no step: it is no rank."""
    if not (env.get("SLURM_STEP_ID") or env.get("SLURM_STEP_TASKS_PER_NODE")):
        return None
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "")
    step = {**env, "SLURM_STEP_NUM_TASKS": tasks}
    placement = _read(step, "slurm")
    if placement is None:
        return None
    node = _optional_number(env, "SLURM_NODEID", least=0) or 0
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = expand_hosts(next((env[key] for key in lists if env.get(key)), ""))
    counts = _slurm_task_counts(env, placement.world_size, len(hosts))
    return replace(
        placement,
        local_size=counts[node] if node < len(counts) else None,
        address=hosts[0] if hosts else None,
        port=_slurm_port(env),
    )


def _slurm_task_counts(env: Mapping[str, str], world_size: int, num_hosts: int) -> list[int]:
    """Tasks of the step on each of its nodes; empty when no variable says so.

    What is said of the whole job counts only if it makes up this step's tasks.
    """
    if text := env.get("SLURM_STEP_TASKS_PER_NODE"):
        return expand_task_counts(text)
    every_node = _optional_number(env, "SLURM_NTASKS_PER_NODE", least=1)
    candidates = [expand_task_counts(env.get("SLURM_TASKS_PER_NODE", "")), [every_node or 0] * num_hosts]
    return next((counts for counts in candidates if sum(counts) == world_size), [])


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port below the ephemeral range that all ranks of a step derive alike and other steps rarely share."""
    job, step = (_optional_number(env, key, least=0) or 0 for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 15000 + (job * 31 + step) % 15000


def expand_task_counts(text: str) -> list[int]:
    """Tasks on each node from Slurm's short form: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def expand_hosts(text: str) -> list[str]:
    """Host names from Slurm's short form: "gpu[01-03],r[1-2]n5" is gpu01, gpu02, gpu03, r1n5, r2n5."""
    hosts: list[str] = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = [
            [piece] if index % 2 == 0 else _expand_ranges(piece)
            for index, piece in enumerate(re.split(r"\[([^\]]*)\]", name))
        ]
        hosts += ["".join(choice) for choice in itertools.product(*pieces)]
    return hosts


def _expand_ranges(text: str) -> list[str]:
    """ "01-03,7" is 01, 02, 03, 7."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers


def _with_master(env: Mapping[str, str], placement: Placement, launcher: str) -> Placement:
    """Adds where the ranks meet: MASTER_ADDR and MASTER_PORT when set, else what Slurm's variables say."""
    address = env.get("MASTER_ADDR") or placement.address
    port = _optional_number(env, "MASTER_PORT", least=0)
    port = placement.port if port is None else port
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if value is None]
    meets_through_mpi = launcher in MPI_LAUNCHERS and len(missing) == 2
    if missing and placement.world_size > 1 and not meets_through_mpi:
        raise LaunchError(
            f"{' and '.join(missing)} not set for a job of {placement.world_size} ranks.",
            "Its ranks meet at rank 0's host name and port.",
            "Start the job with torchrun or mpirun, or export MASTER_ADDR and MASTER_PORT on every rank.",
        )
    return replace(placement, launcher=launcher, address=address, port=port)


def _agree(one: Placement, other: Placement) -> bool:
    return (one.rank, one.world_size) == (other.rank, other.world_size)


def _refuse_disagreement(one: Placement, other: Placement) -> None:
    if _agree(one, other):
        return
    families = [FAMILIES[place.launcher] for place in (one, other)]
    told = [
        f"{family.rank}={place.rank} of {family.world_size}={place.world_size}"
        for family, place in zip(families, (one, other), strict=True)
    ]
    names = f"{families[0].rank} {families[0].world_size}"
    raise LaunchError(
        f"Two launchers disagree: {told[0]}, but {told[1]}.",
        f"The job was started by {families[1].started_by}; the others must be unset or equal.",
        f"Type: unset {names}   and start the job again with one launcher.",
    )


def _whole_number(env: Mapping[str, str], key: str, *, least: int) -> int:
    text = env[key].strip()
    if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
        raise LaunchError(
            f"{key}={env[key]!r}.",
            f"It must be a whole number, {least} or more.",
            f"Correct {key}, or unset it and start the job with torchrun, mpirun or srun.",
        )
    return int(text)


def _optional_number(env: Mapping[str, str], key: str, *, least: int) -> int | None:
    return _whole_number(env, key, least=least) if env.get(key) else None
