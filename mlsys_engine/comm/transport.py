"""What carries bytes between hosts, agreed on by a group's members before anything of it connects.

TCP needs no preparation. With MLSYS_TRANSPORT=mpi each process makes one duplicate of MPI's world, once, and
every group gets message tags in it that no other group of the same ranks uses.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mlsys_engine.comm.environment import TRANSPORT, transport
from mlsys_engine.comm.launch.environment import FAMILIES, MPI_LAUNCHERS, SharedLaunchError
from mlsys_engine.comm.launch.mpi import import_mpi, of_another_world
from mlsys_engine.errors import LaunchError
from mlsys_engine.native import load_comm

_LOOK_S = 0.001
_FAREWELL_S = 2.0
# By one of these mpirun, or srun with an MPI plug-in, tells a process that it is a rank.
_MARKS = (*(FAMILIES[name].world_size for name in MPI_LAUNCHERS), "PMI_RANK", "PMIX_RANK")


@dataclass(kw_only=True)
class _OfProcess:
    """What this process holds of MPI, from its first group that uses it on."""

    communicator: Any = None  # mpi4py's
    pid: int = 0
    next_tag: int = 0


_process = _OfProcess()


def prepare(options: Any, job: Any | None = None) -> Any | None:
    """The native MpiJob that a new group's bytes between hosts travel by; None for TCP.

    Every member calls it when it creates the group. `job` is the native group of all ranks, when there is one
    already: all have told it their transport. Raises LaunchError, on all members alike, when one of them
    cannot use MPI or wants another transport; PeerFailedError when one has died before it came.
    """
    name = transport()
    if options.group_size == 1 or (name == "tcp" and job is not None):
        return None
    mine: dict[str, Any] = {"transport": name}
    if name == "mpi":
        try:
            mine |= _describe_world(_usable_mpi(os.environ), options.group_size)
        except LaunchError as error:
            mine["refusal"] = (error.given, error.expected, error.action)
    verdict = _exchange(options, mine, job)
    if "refusal" in verdict:
        raise SharedLaunchError(*verdict["refusal"])
    if name == "tcp":
        return None
    mpi = _usable_mpi(os.environ)
    if _process.communicator is None:
        _process.communicator = _duplicate_world(mpi, options.timeout)
        _process.pid = os.getpid()
    native = load_comm().MpiJob
    _process.next_tag = verdict["tag"] + native.NUM_TAGS
    return native(
        extension=mpi.__file__,
        handle_bytes=mpi._sizeof(mpi.Comm),
        communicator=mpi._handleof(_process.communicator),
        byte_type=mpi._handleof(mpi.BYTE),
        ranks=verdict["ranks"],
        first_tag=verdict["tag"],
    )


def _usable_mpi(env: Mapping[str, str]) -> Any:
    """`mpi4py.MPI`, initialised for calls from any thread."""
    if not any(env.get(name) for name in _MARKS):
        raise LaunchError(
            f"{TRANSPORT}=mpi is set, but no MPI launcher started this process.",
            "Ranks that mpirun (or srun with an MPI plug-in) starts together can reach one another over MPI.",
            f"Start the job with mpirun, or unset {TRANSPORT} for TCP.",
        )
    mpi = import_mpi(f"{TRANSPORT}=mpi sends through mpi4py's communicator.", f"unset {TRANSPORT} for TCP")
    if mpi.Is_finalized():
        raise LaunchError(
            f"{TRANSPORT}=mpi is set, and MPI has been finalised in this process.",
            "MPI works from MPI_Init to MPI_Finalize, once in a process.",
            "Call MPI.Finalize() when no group is used any more; mpi4py does so at exit.",
        )
    if mpi.Query_thread() < mpi.THREAD_MULTIPLE:
        raise LaunchError(
            f"{TRANSPORT}=mpi is set, and MPI was initialised with thread level {mpi.Query_thread()}.",
            f"Several threads of a rank use it at once, which is level {mpi.THREAD_MULTIPLE} (multiple).",
            "Leave mpi4py.rc.thread_level alone, or use an MPI that was built with support for threads.",
        )
    return mpi


def _describe_world(mpi: Any, group_size: int) -> dict[str, Any]:
    """What the other members must know of this one's place in MPI."""
    if _process.communicator is not None and _process.pid != os.getpid():
        raise LaunchError(
            f"{TRANSPORT}=mpi is set, and this process was forked from a rank of the job.",
            "MPI serves the process that started it, and none of its children.",
            "Create groups in the ranks themselves.",
        )
    world = mpi.COMM_WORLD
    if world.Get_size() < group_size:
        raise of_another_world(
            mpi,
            f"{TRANSPORT}=mpi is set for a group of {group_size} ranks",
            "An MPI launcher started this process, and",
            f"unset {TRANSPORT} for TCP",
        )
    if _process.communicator is None and world.Get_size() != group_size:
        raise LaunchError(
            f"{TRANSPORT}=mpi is set; mpirun started {world.Get_size()} ranks, and the job has {group_size}.",
            "All ranks of MPI's world join in duplicating its communicator when the job begins.",
            f"Start as many ranks as the job has, or unset {TRANSPORT} for TCP.",
        )
    last_tag = world.Get_attr(mpi.TAG_UB)
    if _process.next_tag + load_comm().MpiJob.NUM_TAGS > last_tag:
        raise LaunchError(
            f"{TRANSPORT}=mpi is set, and earlier groups have used all message tags up to {last_tag}.",
            "Every group that is created takes tags of its own.",
            f"Create fewer groups, or unset {TRANSPORT} for TCP.",
        )
    return {"rank": world.Get_rank(), "tag": _process.next_tag}


def _exchange(options: Any, mine: dict[str, Any], job: Any | None) -> dict[str, Any]:
    """Tells group rank 0 what this member has, and returns what it concludes of all members."""
    keys = [f"mlsys/{options.group_id}/transport/{rank}" for rank in range(options.group_size)]
    answer = f"mlsys/{options.group_id}/transport"
    store: dist.Store = options.store
    if options.group_rank != 0:
        store.set(keys[options.group_rank], json.dumps(mine))
    else:
        _await(options, job, keys[1:])
        members = [mine, *(json.loads(store.get(key)) for key in keys[1:])]
        store.set(answer, json.dumps(conclude(members, list(options.global_ranks_in_group))))
    _await(options, job, [answer])
    verdict: dict[str, Any] = json.loads(store.get(answer))
    if "refusal" in verdict:
        _say_goodbye(store, f"{answer}/read", options)
    return verdict


def _say_goodbye(store: dist.Store, read: str, options: Any) -> None:
    """Rank 0 may host the store: it ends with its refusal only when the others have read theirs."""
    num_read = store.add(read, 1)
    deadline = time.monotonic() + _FAREWELL_S
    while options.group_rank == 0 and num_read < options.group_size and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        num_read = store.add(read, 0)


def _await(options: Any, job: Any | None, keys: list[str]) -> None:
    """Waits for keys of the store; for members only as long as the job's group knows of none that is gone."""
    if job is None:
        options.store.wait(keys, options.timeout)
        return
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    deadline = time.monotonic() + options.timeout.total_seconds()
    while not options.store.check(keys):
        job.expect_present(ranks)
        if time.monotonic() > deadline:
            options.store.wait(keys, timedelta(seconds=_LOOK_S))  # raises, with the names of those missing
        time.sleep(_LOOK_S)


def conclude(members: Sequence[Mapping[str, Any]], names: Sequence[int]) -> dict[str, Any]:
    """What members that told this of themselves do: a refusal in three parts, or MPI's ranks and the tag.

    `names` are their ranks in the job, for messages; empty when those are the same.
    """
    names = names or range(len(members))
    first = members[0]
    for member, name in zip(members, names, strict=True):
        if member["transport"] != first["transport"]:
            return {
                "refusal": (
                    f"Rank {names[0]} has {TRANSPORT}={first['transport']} and rank {name} "
                    f"{member['transport']}.",
                    "Both ends of a transfer use the same transport (tcp where the variable is not set).",
                    f"Set {TRANSPORT} alike on all ranks; mpirun passes it on with -x {TRANSPORT} (Open MPI) "
                    f"or -genv {TRANSPORT} mpi (MPICH).",
                )
            }
    for member in members:
        if "refusal" in member:
            return {"refusal": member["refusal"]}
    if first["transport"] != "mpi":
        return {}
    ranks = [member["rank"] for member in members]
    if len(set(ranks)) != len(ranks):
        twice = next(rank for rank in ranks if ranks.count(rank) > 1)
        culprits = [str(name) for name, rank in zip(names, ranks, strict=True) if rank == twice]
        return {
            "refusal": (
                f"{TRANSPORT}=mpi is set, and ranks {' and '.join(culprits)} are both rank {twice} of MPI's "
                "world.",
                "A job that sends over MPI is started by one mpirun.",
                f"Start all ranks with one mpirun, or unset {TRANSPORT} for TCP.",
            )
        }
    return {"ranks": ranks, "tag": max(member["tag"] for member in members)}


def _duplicate_world(mpi: Any, timeout: timedelta) -> Any:
    """A communicator of our own, whose messages meet nobody else's, and which returns errors."""
    communicator, request = mpi.COMM_WORLD.Idup()
    deadline = time.monotonic() + timeout.total_seconds()
    while not request.Test():
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{TRANSPORT}=mpi: MPI_Comm_idup did not end within {timeout.total_seconds():g} s.",
                "All ranks of MPI's world take part in it when the job's group is created.",
                "Look at the other ranks' output, then start the job again.",
            )
        time.sleep(_LOOK_S)
    communicator.Set_errhandler(mpi.ERRORS_RETURN)
    return communicator
