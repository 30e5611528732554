"""Runs a function on several ranks, forked from a warm server process that has already imported torch.

The server (multiprocessing's forkserver) never runs a parallel region, so its children may: OpenMP and
autograd threads do not survive a fork, which is why tests never fork from the pytest process itself.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.context
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

import mlsys_engine
from tests.support.no_gloo import forbid_gloo

_ROOT = Path(__file__).resolve().parents[2]
# torch._dynamo, because every torch.optim.Optimizer imports it when it is made.
_PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "mlsys_engine", "tests.support.ranks"]


@dataclass(frozen=True)
class RankOutcome:
    """What became of one rank: its return value, or its traceback, or the exit code of a rank that died."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What one forked rank is to do."""

    fn: Callable[..., Any]
    rank: int
    world_size: int
    args: tuple[Any, ...]
    variables: Mapping[str, str]
    init: bool


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    init: bool = True,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on each rank and returns the values in rank order.

    `fn` must be a module-level function (it is pickled by name). With `init` each rank first makes gloo
    impossible to construct and calls `mls.init()`. `env` adds variables to all ranks (the server's own were
    fixed at its start). Raises AssertionError with every failing rank's traceback.
    """
    outcomes = run_ranks_collecting(fn, world_size, *args, timeout_s=timeout_s, init=init, env=env)
    failed = [
        f"--- rank {rank}: exit code {outcome.exitcode}\n{outcome.error or 'died without a traceback'}"
        for rank, outcome in enumerate(outcomes)
        if outcome.error or outcome.exitcode
    ]
    if failed:
        raise AssertionError(f"{len(failed)} of {world_size} ranks failed\n" + "\n".join(failed))
    return [outcome.value for outcome in outcomes]


def run_ranks_collecting(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    init: bool = True,
    env: Mapping[str, str] | None = None,
) -> list[RankOutcome]:
    """Like run_ranks, but returns each rank's outcome instead of raising: for tests of failures."""
    context = _warm_server()
    processes, connections = [], []
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        shared = _shared_variables(world_size, listener.getsockname()[1]) | dict(env or {})
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | shared
            # Rank 0 serves the store on this very socket, so that nobody else can take the port meanwhile.
            inherited = listener if rank == 0 and init and world_size > 1 else None
            work = _Work(fn=fn, rank=rank, world_size=world_size, args=args, variables=variables, init=init)
            process = context.Process(target=_rank_main, args=(sender, work, inherited))
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
    values = _collect(connections, timeout_s)
    outcomes = []
    for process, value in zip(processes, values, strict=True):
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()
        value_or_none, error = value or (None, None)
        if value is None and process.exitcode is not None and process.exitcode < 0:
            error = f"killed by signal {-process.exitcode}, or no answer within {timeout_s} s"
        outcomes.append(RankOutcome(value=value_or_none, error=error, exitcode=process.exitcode))
    return outcomes


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def _warm_server() -> multiprocessing.context.ForkServerContext:
    """The fork server, told what to import before it forks; it finds our packages through PYTHONPATH."""
    path = os.environ.get("PYTHONPATH", "")
    if str(_ROOT) not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([path] if path else [])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _shared_variables(world_size: int, port: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MLSYS_LAUNCHER": "local",
        "MLSYS_JOB_KEY": secrets.token_hex(16),
    }


def _collect(connections: list[Connection], timeout_s: float) -> list[tuple[Any, str | None] | None]:
    deadline = time.monotonic() + timeout_s
    values: list[tuple[Any, str | None] | None] = [None] * len(connections)
    open_connections = {connection: index for index, connection in enumerate(connections)}
    while open_connections and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(open_connections), timeout=left):
            with contextlib.suppress(EOFError):
                values[open_connections[ready]] = ready.recv()  # type: ignore[index, union-attr]
            del open_connections[ready]  # type: ignore[arg-type]
    return values


def _rank_main(sender: Connection, work: _Work, listener: socket.socket | None) -> None:
    os.environ.update(work.variables)
    if listener is not None:
        os.environ["MLSYS_LISTEN_FD"] = str(listener.detach())
    failed = False
    try:
        if work.init:
            forbid_gloo()
            mlsys_engine.init()
        value: tuple[Any, str | None] = (work.fn(work.rank, work.world_size, *work.args), None)
    except BaseException as error:
        value, failed = (None, traceback.format_exc()), True
        mlsys_engine.comm.poison(f"{type(error).__name__}: {error}")
    sender.send(value)
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    if failed:
        os._exit(1)
