"""`init()`: joins the job that a launcher started, or becomes a world of one."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mlsys_engine.comm.launch import rendezvous, threads
from mlsys_engine.comm.launch.environment import Placement, detect, unused_slurm_tasks
from mlsys_engine.comm.launch.failure import FailureHook
from mlsys_engine.comm.launch.world import World
from mlsys_engine.errors import LaunchError

BACKEND = "mlsys"
_JOB_KEY = "MLSYS_JOB_KEY"
_DEVICE = "MLSYS_DEVICE"


@dataclass
class _Joined:
    """The World that belongs to torch's default process group, of which a process has one at a time."""

    world: World | None = None
    num_joins: int = 0
    timeout: timedelta = timedelta(seconds=1800)  # of collectives, as given to `init`


_joined = _Joined()


def init(*, timeout_s: float = 1800.0) -> World:
    """Joins the job and returns this rank's World; called at the start, and again it returns the same World.

    Reads the variables of torchrun, Open MPI, MPICH, Intel MPI, Slurm or our own launcher; without any the
    process is a world of one. Fixes affinity and thread count, creates the default process group on backend
    "mlsys", and from then on an uncaught exception on any rank ends the job within a second.
    `timeout_s` bounds the wait for the other ranks here and for every collective later.

    Raises LaunchError when the variables contradict each other, before any rank starts work.
    """
    if timeout_s <= 0:
        raise LaunchError(
            f"timeout_s={timeout_s}.", "It must be above 0 seconds.", "Leave it out for 1800 seconds."
        )
    joined = current_world()
    if joined is not None:
        return joined
    placement = _find_place()
    if placement.launcher != "single":
        _install_hook(placement, None)
    _tell_of_unused_tasks(placement)
    _joined.world = None
    _joined.timeout = timedelta(seconds=timeout_s)
    _joined.world = _join(placement, _joined.timeout)
    return _joined.world


def current_world() -> World | None:
    """The World that `init` returned, or None when it was not called or its group was destroyed since."""
    return _joined.world if dist.is_initialized() else None


def rejoin(world: World, store: dist.Store) -> World:
    """Makes `world` this process's job, with a new default group that meets through `store`; returns it.

    Called by `reconfigure` when the old group has been destroyed.
    """
    dist.init_process_group(
        BACKEND,
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=_joined.timeout,
    )
    _install_hook(
        Placement(launcher=world.launcher, rank=world.rank, world_size=world.world_size),
        store if world.world_size > 1 else None,
    )
    _joined.world = world
    return world


def _join(placement: Placement, timeout: timedelta) -> World:
    affinity = threads.fix_affinity(os.environ, launched=placement.launcher != "single")
    exists = dist.is_initialized()
    base = dist.distributed_c10d._get_default_store() if exists else rendezvous.make_store(placement, timeout)
    # An agent's store outlives its workers' restarts, and a process may join again after leaving its group.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"mlsys/{restart}/{_joined.num_joins}", base)
    _joined.num_joins += 1
    hosts = rendezvous.agree(store, placement, os.environ.get(_JOB_KEY), timeout)
    local_rank, local_size = locate(placement, hosts)
    num_threads = threads.fix_threads(
        os.environ, num_cpus=threads.usable_cpus(affinity), local_size=local_size
    )
    device = device_of(
        os.environ, rank=placement.rank, local_rank=local_rank, world_size=placement.world_size
    )
    if not exists:
        dist.init_process_group(
            BACKEND,
            store=dist.PrefixStore("group", store),
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timeout,
        )
    atexit.register(_leave_group)
    if placement.world_size > 1:
        _install_hook(placement, store)
    return World(
        rank=placement.rank,
        local_rank=local_rank,
        world_size=placement.world_size,
        local_size=local_size,
        hosts=hosts,
        device=device,
        launcher=placement.launcher,
        num_threads=num_threads,
        affinity=affinity,
        backend=BACKEND,
    )


def locate(placement: Placement, hosts: tuple[str, ...]) -> tuple[int, int]:
    """Local rank and size: what the launcher says, else counted from the host names."""
    here = [rank for rank, host in enumerate(hosts) if host == hosts[placement.rank]]
    local_rank = here.index(placement.rank) if placement.local_rank is None else placement.local_rank
    local_size = len(here) if placement.local_size is None else placement.local_size
    return local_rank, max(local_size, local_rank + 1)


def device_of(env: Mapping[str, str], *, rank: int, local_rank: int, world_size: int) -> torch.device:
    """Where a rank computes: the CPU, or with MLSYS_DEVICE=cuda the GPU of its local rank.

    The CPU is the default also on a host with GPUs, where rank 0 says so.
    """
    asked = env.get(_DEVICE, "")
    if asked not in {"", "cpu", "cuda"}:
        raise LaunchError(
            f"{_DEVICE}={asked!r}.", 'It is "cpu" (the default) or "cuda".', f"Type: unset {_DEVICE}"
        )
    if asked == "cuda":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local_rank >= num_gpus or (world_size > 1 and not dist.is_nccl_available()):
            nccl = "has" if dist.is_nccl_available() else "does not have"
            raise LaunchError(
                f"{_DEVICE}=cuda is set; local rank {local_rank} sees {num_gpus} usable GPUs "
                f"and torch {nccl} NCCL.",
                "Every local rank needs a GPU of its own, and more than one rank needs NCCL.",
                f"Start at most one rank a GPU on a CUDA build of torch, or unset {_DEVICE}.",
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if not asked and rank == 0 and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        sys.stderr.write(
            f"mlsys: this host has {num_gpus} GPU{'s' * (num_gpus != 1)}, but ranks compute on the CPU: "
            f"training on GPUs is not proved yet. {_DEVICE}=cuda tries it, {_DEVICE}=cpu says no more.\n"
        )
    return torch.device("cpu")


def _install_hook(placement: Placement | None, store: dist.Store | None) -> None:
    """Replaces our earlier hook by one that knows more; keeps what was there before us."""
    current = sys.excepthook
    previous = current.previous if isinstance(current, FailureHook) else current
    sys.excepthook = FailureHook(
        rank=None if placement is None else placement.rank,
        world_size=0 if placement is None else placement.world_size,
        host=socket.gethostname(),
        store=store,
        previous=previous,
    )


def _find_place() -> Placement:
    """This process's place: that of a group which the caller already made, else what the variables say."""
    if not dist.is_initialized():
        try:
            return detect(os.environ)
        except LaunchError:
            _install_hook(None, None)
            raise
    backend = str(dist.get_backend())
    if BACKEND not in backend:
        raise LaunchError(
            f'The default process group has backend "{backend}".',
            f'The engine runs on backend "{BACKEND}".',
            "Call mls.init() instead of torch.distributed.init_process_group(), or pass it "
            f'backend="{BACKEND}" after import mlsys_engine.comm.',
        )
    return Placement(launcher="env", rank=dist.get_rank(), world_size=dist.get_world_size())


def _tell_of_unused_tasks(placement: Placement) -> None:
    tasks = unused_slurm_tasks(os.environ) if placement.launcher == "single" else 0
    if tasks:
        sys.stderr.write(
            f"mlsys: SLURM_NTASKS={tasks}, but srun did not start this process, so it is a world of one. "
            "Type: srun python ...\n"
        )


def _leave_group() -> None:
    """Ends the group before the interpreter goes, so that no native thread outlives it."""
    if dist.is_initialized():
        dist.destroy_process_group()
