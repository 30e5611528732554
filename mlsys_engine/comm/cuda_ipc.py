"""The all-reduce between the GPUs of one host over CUDA IPC: whether a group uses it, and for which sizes."""

from __future__ import annotations

import functools
import json
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine.errors import ConfigError
from mlsys_engine.native import load_comm

VARIABLE = "MLSYS_CUDA_ALLREDUCE"
MOST_BYTES = 8 << 20
MOST_RANKS = 8

_TUNED_BYTES = tuple(1 << shift for shift in range(12, 24))  # 4 KiB to 8 MiB
_ROUNDS, _CALLS = 5, 20


def chosen_all_reduce() -> str:
    """What MLSYS_CUDA_ALLREDUCE says: "nccl" (the default), "ipc" or "auto"."""
    choice = os.environ.get(VARIABLE, "nccl")
    if choice not in {"nccl", "ipc", "auto"}:
        raise ConfigError(
            f"{VARIABLE}={choice!r} is set.",
            'It is "nccl" (the default), "ipc" (all-reduces up to 8 MiB inside a host over CUDA IPC) or '
            '"auto" (the same, up to the size at which it is faster here).',
            f"Type: unset {VARIABLE}",
        )
    return choice


def ipc_preparer(options: Any) -> Callable[[int, int, Any], Any] | None:
    """What sets the CUDA IPC all-reduce up for a group; None where the group does not want or cannot have it.

    The native group calls it on all ranks, in the first collective on CUDA tensors, with the device's index,
    the number of hosts and the group's NCCL backend. It returns the native object, or None for NCCL.
    """
    choice = chosen_all_reduce()
    if choice == "nccl" or not 2 <= options.group_size <= MOST_RANKS:
        return None
    native = getattr(load_comm(), "CudaIpcAllReduce", None)
    if native is None:
        if choice == "auto":
            return None
        raise ConfigError(
            f"{VARIABLE}=ipc is set.",
            "The native extensions were built without CUDA.",
            "Build them where nvcc is and torch has CUDA (python setup.py build_ext --inplace), "
            f"or unset {VARIABLE}.",
        )

    def prepare(device: int, num_hosts: int, nccl: Any) -> Any:
        if num_hosts != 1:
            return None
        _refuse_capture()
        exchange = Exchange(dist.PrefixStore("cuda_ipc", options.store), options)
        made = map_peers(native, device, exchange, options)
        if isinstance(made, list):  # why it failed, on any rank
            if choice == "auto":
                return None
            raise ConfigError(
                f"{VARIABLE}=ipc is set, and a rank could not map the memory of the others: {made[0]}.",
                "All GPUs of the group must reach each other's memory.",
                f"Set {VARIABLE}=auto to go on without, or unset it.",
            )
        limit = MOST_BYTES if choice == "ipc" else _faster_up_to(made, nccl, device, exchange)
        made.set_limit(limit)
        return made if limit else None

    return prepare


class Exchange:
    """Every rank's value to every rank, through the group's store."""

    def __init__(self, store: dist.Store, options: Any) -> None:
        self._store, self._rank, self._size = store, options.group_rank, options.group_size

    def __call__(self, name: str, mine: Any) -> list[Any]:
        self._store.set(f"{name}/{self._rank}", json.dumps(mine))
        return [json.loads(self._store.get(f"{name}/{rank}")) for rank in range(self._size)]


def map_peers(native: Any, device: int, exchange: Exchange, options: Any) -> Any:
    """The object with every rank's memory mapped, or the list of what went wrong, alike on all ranks."""
    made, problem, handle = None, "", b""
    try:
        made = native(device, options.group_rank, options.group_size, MOST_BYTES, options.timeout)
        handle = made.share()
    except RuntimeError as error:
        problem = str(error)
    handles = [bytes.fromhex(text) for text in exchange("handle", handle.hex())]
    if made is not None and all(handles):
        try:
            made.open(handles)
        except RuntimeError as error:
            problem = str(error)
    problems = [text for text in exchange("problem", problem) if text]
    return problems or made


def _faster_up_to(made: Any, nccl: Any, device: int, exchange: Exchange) -> int:
    """The largest size in bytes up to which ours is faster than NCCL on every rank; 0 when it is nowhere."""
    options = dist.AllreduceOptions()
    limit = 0
    timed = []
    for num_bytes in _TUNED_BYTES:
        tensor = torch.zeros(num_bytes // 4, device=torch.device("cuda", device))
        ours, theirs = [], []
        for _ in range(_ROUNDS):
            ours.append(_time_us(functools.partial(made.all_reduce, tensor, options)))
            theirs.append(_time_us(functools.partial(_all_reduce_with, nccl, tensor, options)))
        timed.append((statistics.median(ours), statistics.median(theirs)))
    everyone = exchange("timed", timed)
    for index, num_bytes in enumerate(_TUNED_BYTES):
        if any(rank[index][0] >= rank[index][1] for rank in everyone):
            break
        limit = num_bytes
    return limit


def _all_reduce_with(backend: Any, tensor: torch.Tensor, options: Any) -> None:
    backend.allreduce([tensor], options).wait()


def _time_us(call: Callable[[], Any]) -> float:
    """Microseconds of one call on the device, as the mean of a few after a warm-up."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / _CALLS


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "The first collective of a group on CUDA tensors was called while a graph is captured.",
            "It sets the group up, which a graph cannot hold.",
            "Call any collective once before the capture.",
        )
