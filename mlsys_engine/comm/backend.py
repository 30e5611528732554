"""Registers the c10d backend "mlsys" and creates its process groups when torch asks for one."""

from __future__ import annotations

import atexit
import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from mlsys_engine.comm.accelerator import nccl_maker
from mlsys_engine.comm.cuda_ipc import ipc_preparer
from mlsys_engine.comm.environment import job_key, locality, recorder_settings, sockets_per_peer
from mlsys_engine.comm.groups import job_group
from mlsys_engine.comm.torch_buckets import put_buckets_into_the_arena
from mlsys_engine.comm.transport import prepare
from mlsys_engine.native import load_comm

NAME = "mlsys"


def register() -> None:
    """Makes `init_process_group("mlsys")` known; opens nothing and loads nothing. Idempotent."""
    if NAME not in dist.Backend.backend_list:
        # One name and one object for both device types, because torch keeps one custom backend in a group:
        # the object itself passes CUDA tensors on to NCCL, or refuses them in words.
        dist.Backend.register_backend(NAME, create_group, extended_api=True, devices=["cpu", "cuda"])


def create_group(options: Any, backend_options: Any) -> Any:
    """Called by torch for each new group with its rendezvous store, on all its members.

    The group connects here: its first operation may be a message, of which the members that neither send nor
    receive it know nothing, and from here on the death of any rank is noticed.
    """
    put_buckets_into_the_arena()
    ranks: Sequence[int] = list(options.global_ranks_in_group) or range(options.group_size)
    job = job_group()
    # Further groups have the job's key: to agree on one, all would have to be alive.
    key = job_key() or ("" if job else _agreed_key(options.store, options.group_rank))
    mpi = prepare(options, job)
    make_nccl = nccl_maker(options, backend_options, ranks)
    load_comm().configure_recorder(**dataclasses.asdict(recorder_settings()))
    group = load_comm().create(
        store=options.store,
        rank=options.group_rank,
        size=options.group_size,
        timeout=options.timeout,
        group_name=str(options.group_id),
        global_ranks=list(ranks),
        locality=locality(ranks),
        job_key=key,
        sockets_per_peer=sockets_per_peer(),
        job=job,
        make_accelerator=make_nccl,
        make_small=None if make_nccl is None else ipc_preparer(options),
        mpi=mpi,
    )
    # Worker threads must be gone before the interpreter is; the farewell does not keep the group alive.
    atexit.register(group.farewell().say)
    group.connect()
    return group


def _agreed_key(store: dist.Store, rank: int) -> str:
    """A key that group rank 0 draws, for launchers that set none: as private as the store itself."""
    if rank == 0:
        store.set("mlsys/job_key", secrets.token_hex(32))
    return bytes(store.get("mlsys/job_key")).decode()
