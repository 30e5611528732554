"""What a rank does with an exception that nobody caught: it tells the others and leaves at once.

The first rank to fail prints its traceback (once in the job) and poisons the group, so that every other
rank's wait ends with PeerFailedError; those print one line. All leave by `os._exit`: an orderly exit would
wait for peers that are going, too. A caller's mistake (UserError) is told once, without a traceback, and
ends with status 2.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from mlsys_engine.comm.faults import poison
from mlsys_engine.comm.launch.environment import SharedLaunchError
from mlsys_engine.comm.launch.last_words import wait_until_read
from mlsys_engine.comm.launch.mpi import leave_through_abort
from mlsys_engine.errors import NativeBuildError, PeerFailedError, UserError

USER_ERROR_STATUS = 2
SURVIVOR_STATUS = 75
"""Exit status of a rank that leaves because another one failed (EX_TEMPFAIL): it is not the culprit."""

# A rank with nothing to say stays this long, so that a launcher which kills the job at the first exit does
# not cut off the one that is still writing its traceback.
_LINGER_S = 0.15
# Rank 0 may host the store by which the failing ranks settle who tells; it stays up to this long for them.
_HOST_LINGER_S = 0.3
_STORE_TIMEOUT_S = 0.3
# A launcher has this long to read the traceback before it is told to end the job.
_READ_S = 0.3
_TOLD_WITHOUT_TRACEBACK = (UserError, NativeBuildError)

_Result = TypeVar("_Result")
Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


@dataclass(frozen=True, kw_only=True)
class FailureHook:
    """The `sys.excepthook` of a launched rank. `store` is None until the ranks have met."""

    rank: int | None
    world_size: int
    host: str
    store: dist.Store | None
    previous: Hook

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None = None
    ) -> None:
        """Reports the error as its kind demands and ends the process (not an interactive session)."""
        if hasattr(sys, "ps1") or sys.flags.interactive:
            self.previous(kind, error, trace)
            return
        peer = peer_failure(error)
        if peer is not None:
            kind_of_failure = _one_line(peer.cause).partition(":")[0]  # its message is the culprit's to tell
            self._say(f"{self._name} leaves: rank {peer.rank} on {peer.host} failed ({kind_of_failure}).")
            self._leave(SURVIVOR_STATUS, linger_s=_LINGER_S)
        status, report = describe(error, trace)
        every_rank_fails = isinstance(error, SharedLaunchError) and self.store is None
        is_first = not self.rank if every_rank_fails else self._is_first_to_fail()
        if is_first:
            self._say(
                report if isinstance(error, _TOLD_WITHOUT_TRACEBACK) else f"{self._name} failed.\n{report}"
            )
        elif not isinstance(error, _TOLD_WITHOUT_TRACEBACK):
            self._say(f"{self._name} failed, too: {_one_line(f'{kind.__name__}: {error}')}\n")
        if self.store is not None:
            with contextlib.suppress(Exception):  # the process ends in any case, and the others see it leave
                poison(_one_line(f"{kind.__name__}: {error}"))
        self._wait_for_the_others()
        if not every_rank_fails:
            self._wait_until_read()
            leave_through_abort(status)
        self._leave(status, linger_s=0.0 if is_first else _LINGER_S)

    @property
    def _name(self) -> str:
        rank = "a rank" if self.rank is None else f"rank {self.rank}"
        return f"mlsys: {rank} of {self.world_size} on {self.host} (pid {os.getpid()})"

    def _is_first_to_fail(self) -> bool:
        """Whether this rank is the first, which tells; also true when no store can be asked."""
        store = self.store
        if store is None:
            return True
        count = _within(_STORE_TIMEOUT_S, lambda: store.add("failures", 1))
        return count is None or count == 1

    def _wait_for_the_others(self) -> None:
        """Keeps the store of rank 0 alive for the ranks that fail at the same moment."""
        store = self.store
        if store is None or self.rank != 0:
            return
        deadline = time.monotonic() + _HOST_LINGER_S
        while time.monotonic() < deadline:
            count = _within(_STORE_TIMEOUT_S, lambda: store.add("failures", 0))
            if count is None or count >= self.world_size:
                return
            time.sleep(0.01)

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed stderr must not keep the rank from leaving
            sys.stderr.write(text if text.endswith("\n") else text + "\n")
            sys.stderr.flush()

    @staticmethod
    def _wait_until_read() -> None:
        with contextlib.suppress(OSError, ValueError):  # a stderr without a descriptor
            wait_until_read(sys.stderr.fileno(), _READ_S)

    @staticmethod
    def _leave(status: int, *, linger_s: float) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        time.sleep(linger_s)
        os._exit(status)


def describe(error: BaseException, trace: TracebackType | None) -> tuple[int, str]:
    """The exit status that an uncaught error deserves, and what to print about it."""
    if isinstance(error, _TOLD_WITHOUT_TRACEBACK):
        return USER_ERROR_STATUS, f"mlsys: {error}\n"
    if isinstance(error, KeyboardInterrupt):
        return 130, "Interrupted.\n"
    return 1, "".join(traceback.format_exception(type(error), error, trace))


def peer_failure(error: BaseException) -> PeerFailedError | None:
    """The PeerFailedError that `error` is, or was raised because of."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, PeerFailedError):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def _within(seconds: float, action: Callable[[], _Result]) -> _Result | None:
    """The action's result, or None when it fails or takes longer: a store's host may have gone or hang."""
    results: list[_Result] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            results.append(action())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
