"""Runs a function on several ranks, forked from a warm server process that has already imported torch.

The server (multiprocessing's forkserver) never runs a parallel region, so its children may: OpenMP and autograd
threads do not survive a fork, which is why tests never fork from the pytest process itself.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_PRELOAD = ["torch", "torch.distributed", "mlsys_engine"]


@dataclass(frozen=True)
class RankOutcome:
    """What became of one rank: its return value, or its traceback, or the exit code of a rank that died."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, init: bool = True,
              env: Mapping[str, str] | None = None) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on each rank and returns the values in rank order.

    `fn` must be a module-level function (it is pickled by name). With `init` each rank first calls `mls.init()`.
    `env` adds variables to all ranks. Raises AssertionError with every failing rank's traceback.
    """
    outcomes = run_ranks_collecting(fn, world_size, *args, timeout_s=timeout_s, init=init, env=env)
    failed = [f"--- rank {rank}: exit code {outcome.exitcode}\n{outcome.error or 'died without a traceback'}"
              for rank, outcome in enumerate(outcomes) if outcome.error or outcome.exitcode]
    if failed:
        raise AssertionError(f"{len(failed)} of {world_size} ranks failed\n" + "\n".join(failed))
    return [outcome.value for outcome in outcomes]


def run_ranks_collecting(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0,
                         init: bool = True, env: Mapping[str, str] | None = None) -> list[RankOutcome]:
    """Like run_ranks, but returns each rank's outcome instead of raising: for tests of failures."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = free_port()
    processes, connections = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        variables = _rank_variables(rank, world_size, port) | dict(env or {})
        process = context.Process(target=_rank_main, args=(sender, fn, rank, world_size, args, variables, init))
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


def _rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _collect(connections: list[Connection], timeout_s: float) -> list[tuple[Any, str | None] | None]:
    deadline = time.monotonic() + timeout_s
    values: list[tuple[Any, str | None] | None] = [None] * len(connections)
    open_connections = {connection: index for index, connection in enumerate(connections)}
    while open_connections and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(open_connections), timeout=left):
            try:
                values[open_connections[ready]] = ready.recv()  # type: ignore[index, union-attr]
            except EOFError:
                pass
            del open_connections[ready]  # type: ignore[arg-type]
    return values


def _rank_main(sender: Connection, fn: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...],
               variables: dict[str, str], init: bool) -> None:
    os.environ.update(variables)
    failed = False
    try:
        if init:
            import mlsys_engine

            mlsys_engine.init()
        value: tuple[Any, str | None] = (fn(rank, world_size, *args), None)
    except BaseException:
        value, failed = (None, traceback.format_exc()), True
    sender.send(value)
    sender.close()
    _leave()
    if failed:
        os._exit(1)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
