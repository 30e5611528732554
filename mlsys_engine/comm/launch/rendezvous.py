"""Makes the store that all ranks share, and lets them agree on who is there before any work starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from mlsys_engine.comm.launch.environment import MPI_LAUNCHERS, Placement, SharedLaunchError
from mlsys_engine.comm.launch.mpi import load_mpi
from mlsys_engine.errors import LaunchError

LISTEN_FD = "MLSYS_LISTEN_FD"
"""A listening socket inherited from the local launcher: no other process can take the port meanwhile."""

_ANSWER_MARGIN = timedelta(seconds=2)  # how much longer the ranks wait for rank 0's refusal than it for them


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one rank tells the others when it arrives."""

    host: str
    pid: int
    world_size: int
    key_digest: str


def make_store(placement: Placement, timeout: timedelta) -> dist.Store:
    """A store that all ranks of the job share; a world of one needs no socket."""
    if placement.world_size == 1:
        return dist.HashStore()
    if placement.address is None or placement.port is None:
        return _meet_through_mpi(placement, timeout)
    if placement.rank == 0 and not _hosted_by_agent():
        inherited = os.environ.pop(LISTEN_FD, None)
        return _serve(placement.address, placement.port, placement, timeout, inherited)
    return _connect(placement.address, placement.port, placement, timeout)


def agree(
    store: dist.Store, placement: Placement, job_key: str | None, timeout: timedelta
) -> tuple[str, ...]:
    """Waits for all ranks and returns each one's host name; refuses doubles and disagreements on all ranks.

    `job_key` is only compared: where none is set, the backend draws one for each group through its store.
    """
    arrival = Arrival(
        host=socket.gethostname(),
        pid=os.getpid(),
        world_size=placement.world_size,
        key_digest=_digest(job_key),
    )
    if placement.world_size == 1:
        return (arrival.host,)
    if store.add(f"claim/{placement.rank}", 1) > 1:
        raise LaunchError(
            f"Another process has already joined as rank {placement.rank} of {placement.world_size}.",
            "Each process of a job has its own rank.",
            "Give every process its own RANK, or start the job with torchrun, mpirun or srun.",
        )
    store.set(f"arrival/{placement.rank}", json.dumps(asdict(arrival)))
    if placement.rank == 0:
        store.set("roster", json.dumps(_call_roll(store, placement, timeout)))
    else:
        _wait(store, ["roster"], timeout + _ANSWER_MARGIN)
    answer = json.loads(store.get("roster"))
    if "refusal" in answer:
        with contextlib.suppress(LaunchError):  # not everybody came, so not everybody reads the refusal
            _say_goodbye(store, placement, _ANSWER_MARGIN)
        raise SharedLaunchError(*answer["refusal"])
    _say_goodbye(store, placement, timeout)
    return tuple(answer["hosts"])


def _call_roll(store: dist.Store, placement: Placement, timeout: timedelta) -> dict[str, Any]:
    """Rank 0 reads every arrival and answers with the roster, or with the reason to refuse the job."""
    keys = [f"arrival/{rank}" for rank in range(placement.world_size)]
    try:
        _wait(store, keys, timeout)
    except LaunchError:
        absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        return {
            "refusal": (
                f"Rank {', '.join(absent)} of {placement.world_size} did not arrive within "
                f"{timeout.total_seconds():g} s.",
                "All ranks must call mls.init() before any can start.",
                "Look at that rank's own output, then start the job again.",
            )
        }
    arrivals = [Arrival(**json.loads(store.get(key))) for key in keys]
    for rank, arrival in enumerate(arrivals):
        if arrival.world_size != placement.world_size:
            return {
                "refusal": (
                    f"Rank 0 was told of {placement.world_size} ranks, rank {rank} of {arrival.world_size}.",
                    "All ranks must be started with one world size.",
                    "Correct WORLD_SIZE, or start the job with torchrun, mpirun or srun.",
                )
            }
        if arrival.key_digest != arrivals[0].key_digest:
            return {
                "refusal": (
                    f"Rank {rank} has another MLSYS_JOB_KEY than rank 0.",
                    "The key proves that a process belongs to the job, so all ranks carry the same.",
                    "Set MLSYS_JOB_KEY alike on all hosts, or unset it everywhere.",
                )
            }
    return {"hosts": [arrival.host for arrival in arrivals]}


def _say_goodbye(store: dist.Store, placement: Placement, timeout: timedelta) -> None:
    """Rank 0 may host the store, so it goes on only when nobody reads the roster any more."""
    if store.add("read", 1) == placement.world_size:
        store.set("all_read", "1")
    if placement.rank == 0:
        _wait(store, ["all_read"], timeout)


def _wait(store: dist.Store, keys: list[str], timeout: timedelta) -> None:
    try:
        store.wait(keys, timeout)
    except dist.DistError as error:
        raise LaunchError(
            f"The other ranks did not answer within {timeout.total_seconds():g} s: {_first_line(error)}.",
            "All ranks must call mls.init() and stay alive.",
            "Look at the other ranks' output, then start the job again.",
        ) from error


def _hosted_by_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _serve(
    address: str, port: int, placement: Placement, timeout: timedelta, inherited: str | None = None
) -> dist.TCPStore:
    """Rank 0's end of the store, on a socket inherited from the local launcher when there is one."""
    try:
        return dist.TCPStore(
            address,
            port,
            placement.world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=int(inherited) if inherited is not None else None,
        )
    except dist.DistError as error:
        raise LaunchError(
            f"Rank 0 cannot listen on port {port} ({_first_line(error)}).",
            "The port must be free on rank 0's host, or 0 of a launcher that picks one.",
            "Set MASTER_PORT to a free port, the same on every rank.",
        ) from error


def _connect(address: str, port: int, placement: Placement, timeout: timedelta) -> dist.TCPStore:
    try:
        return dist.TCPStore(address, port, placement.world_size, is_master=False, timeout=timeout)
    except dist.DistError as error:
        raise LaunchError(
            f"Rank {placement.rank} cannot reach rank 0 at {address}:{port} ({_first_line(error)}).",
            f"Rank 0 must be up within {timeout.total_seconds():g} s and its port open between the hosts.",
            "Check MASTER_ADDR and MASTER_PORT, and rank 0's own output.",
        ) from error


def _meet_through_mpi(placement: Placement, timeout: timedelta) -> dist.Store:
    """Rank 0 opens the store on a port that the system picks and broadcasts where it can be reached."""
    assert placement.launcher in MPI_LAUNCHERS
    world = load_mpi(placement).COMM_WORLD
    if placement.rank == 0:
        store = _serve("localhost", 0, placement, timeout)
        world.bcast((socket.gethostname(), addresses_of_this_host(), store.port), root=0)
        return store
    host, addresses, port = world.bcast(None, root=0)
    if host == socket.gethostname():
        addresses = ["localhost", *addresses]
    return _connect(first_reachable(addresses, port), port, placement, timeout)


def addresses_of_this_host() -> list[str]:
    """Names and addresses under which other hosts may reach this one, the likeliest first."""
    interfaces = psutil.net_if_addrs().values()
    numeric = [entry.address for entries in interfaces for entry in entries if entry.family == socket.AF_INET]
    return [socket.getfqdn(), socket.gethostname(), *(a for a in numeric if not a.startswith("127."))]


def first_reachable(addresses: list[str], port: int) -> str:
    """The first address that accepts a connection; the very first when none does, so that errors name it."""
    for address in addresses:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2.0):
            return str(address)
    return str(addresses[0])


def _digest(job_key: str | None) -> str:
    return "" if job_key is None else hashlib.sha256(job_key.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
