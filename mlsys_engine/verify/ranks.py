"""Runs a function on ranks of this machine that it starts itself, for a caller that is in no job.

Forked, so that a model whose class or loss has no importable name can be verified, and the reference is
shared instead of sent. What does not survive a fork are threads: the ranks compute on one thread each and on
the CPU. With an accelerator autograd has threads in the parent, so there the ranks are spawned, and what they
are given has to be pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.comm.launch import init
from mlsys_engine.comm.launch.rendezvous import LISTEN_FD
from mlsys_engine.errors import ConfigError, InternalError, LaunchError, PeerFailedError, UserError

T = TypeVar("T")
_LEAVE_S = 5.0
# A rank's answer: what became of it, and its value, its mistake's three parts or its traceback. In the order
# in which they are told when several ranks fail; a rank that only lost a peer knows nothing.
_VALUE, _MISTAKE, _BUG, _DIED, _PEER = "value", "mistake", "bug", "died", "peer"
_ORDER = (_MISTAKE, _BUG, _DIED, _PEER)
_Answer = tuple[str, Any]


def run_on_local_ranks(function: Callable[[], T], num_ranks: int, timeout_s: float) -> list[T]:
    """Calls `function` on `num_ranks` ranks that have joined one job, and returns what they return, by rank.

    Raises ConfigError with the three parts of a rank's own mistake, InternalError with the traceback of
    anything else, once, and LaunchError when a rank dies or they take more than `timeout_s` seconds.
    """
    spawn, fork = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
    make = spawn.Process if torch.accelerator.is_available() else fork.Process
    processes: list[BaseProcess] = []
    receivers: list[Connection] = []
    try:
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            shared = _variables(num_ranks, listener.getsockname()[1])
            for rank in range(num_ranks):
                receiver, sender = fork.Pipe(duplex=False)
                variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                process: BaseProcess = make(
                    target=_rank_main, args=(function, sender, variables, listener), daemon=True
                )
                with warnings.catch_warnings():  # Python warns of threads at a fork; see the top
                    warnings.simplefilter("ignore", DeprecationWarning)
                    _start(process)
                sender.close()
                processes.append(process)
                receivers.append(receiver)
        answers = _collect(receivers, timeout_s)
        for process in processes:
            process.join(_LEAVE_S)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    _raise_first(answers)
    return [value for _, value in answers]


def _variables(num_ranks: int, port: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MLSYS_LAUNCHER": "local",
        "MLSYS_JOB_KEY": secrets.token_hex(16),
        "MLSYS_DEVICE": "cpu",
        "MLSYS_NUM_THREADS": "1",
    }


def _start(process: BaseProcess) -> None:
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"What verify was given cannot be sent to another process: {error}.",
            "On a machine with an accelerator its ranks are spawned and get model, batch, loss and optimizer "
            "pickled.",
            "Define them at the top level of a module, or call verify in a job of the plan's ranks.",
        ) from error


def _collect(receivers: Sequence[Connection], timeout_s: float) -> list[_Answer]:
    answers: dict[Connection, _Answer] = {}
    deadline = time.monotonic() + timeout_s
    while waiting := [receiver for receiver in receivers if receiver not in answers]:
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            rank = receivers.index(waiting[0])
            raise LaunchError(
                f"Rank {rank} of {len(receivers)} has not answered in {timeout_s:g} s.",
                "verify expects its ranks to end one step in that time.",
                "Give a smaller batch, or a larger timeout_s.",
            )
        for receiver in ready:
            assert isinstance(receiver, Connection)
            try:
                answers[receiver] = receiver.recv()
            except EOFError:
                answers[receiver] = (_DIED, None)
    return [answers[receiver] for receiver in receivers]


def _raise_first(answers: Sequence[_Answer]) -> None:
    """Raises what the culprit told, where not all went well."""
    failed = [(_ORDER.index(kind), rank) for rank, (kind, _) in enumerate(answers) if kind != _VALUE]
    if not failed:
        return
    _, rank = min(failed)
    kind, told = answers[rank]
    if kind == _MISTAKE:
        given, expected, action = told
        raise ConfigError(f"On rank {rank}: {given}", expected, action)
    if kind == _DIED:
        raise LaunchError(
            f"Rank {rank} of verify died without a word.",
            "A rank answers with its differences.",
            "Look for the kernel's out-of-memory killer, and verify a smaller model.",
        )
    raise InternalError(f"verify failed on rank {rank}:\n{told}")


def _rank_main(
    function: Callable[[], Any], sender: Connection, variables: Mapping[str, str], listener: socket.socket
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    if variables["RANK"] == "0" and variables["WORLD_SIZE"] != "1":
        os.environ[LISTEN_FD] = str(listener.detach())
    else:
        os.environ.pop(LISTEN_FD, None)
        listener.close()
    try:
        if dist.is_initialized():  # the caller's world of one
            dist.destroy_process_group()
        init()
        answer: _Answer = (_VALUE, function())
    except BaseException as error:
        comm.poison(f"{type(error).__name__}: {error}")
        if isinstance(error, UserError):
            answer = (_MISTAKE, (error.given, error.expected, error.action))
        else:
            answer = (_PEER if isinstance(error, PeerFailedError) else _BUG, traceback.format_exc())
    sender.send(answer)
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()
