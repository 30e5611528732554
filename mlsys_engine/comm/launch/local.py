"""Starts ranks on this machine and stays with them: our own small launcher behind `mlsys train --ranks N`."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from mlsys_engine.comm.launch.failure import SURVIVOR_STATUS
from mlsys_engine.comm.launch.rendezvous import LISTEN_FD
from mlsys_engine.errors import LaunchError

# After the first failure the others have this long to leave by themselves, and to leave after SIGTERM.
_LEAVE_S = 0.4
_KILL_S = 0.8
# A signal that reached only one rank stops all of them in order, and they may take this long to leave.
_STOP_S = 10.0
# Survivors may end first, since a culprit that exits in good order still has to take its interpreter down: it
# gets this long, so that its own status is the one that is told.
_CULPRIT_S = 3.0
_POLL_S = 0.02
_STDERR_KEPT_BYTES = 256 * 1024
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


@dataclass(kw_only=True)
class _Rank:
    """One started process and the end of what it wrote to stderr (rank 0 writes to ours)."""

    rank: int
    process: subprocess.Popen[bytes]
    stderr: bytearray = field(default_factory=bytearray)

    def read(self, stream: IO[bytes]) -> bool:
        """Takes what is there; False at the end of the stream."""
        data = os.read(stream.fileno(), 65536)
        self.stderr += data
        del self.stderr[:-_STDERR_KEPT_BYTES]
        return bool(data)

    def signal(self, number: int) -> None:
        """Signals the rank and its own children (loader workers)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def launch_local(
    argv: Sequence[str],
    num_ranks: int,
    env: Mapping[str, str] | None = None,
    *,
    tolerate_failures: bool = False,
) -> int:
    """Runs `python *argv` as `num_ranks` local ranks and returns the job's exit status when all have ended.

    `argv` is what follows the interpreter (["-m", "mlsys_engine.cli.main", "train"]); `env` adds variables.
    The first rank that fails by itself is the culprit: the others leave or are killed within a second, its
    stderr is shown, and its status returned (128 + n for signal n). SIGINT, SIGTERM, SIGHUP and SIGUSR1 are
    passed on to the ranks, which may take their time to save; leaving with 128 + n is then no failure, and
    the job's status. A second signal kills them. Ranks die with this process.

    With `tolerate_failures`, or MLSYS_ELASTIC=1 in the environment, a rank that fails takes nobody with it:
    the others may go on after `mls.comm.reconfigure()`. The status is then 0 as soon as one rank ends well.
    """
    tolerate_failures = tolerate_failures or os.environ.get("MLSYS_ELASTIC") == "1"
    if num_ranks < 1:
        raise LaunchError(f"{num_ranks} ranks.", "A job has at least 1.", "Type: --ranks 1, or more.")
    command = [*argv] if argv and argv[0] == sys.executable else [sys.executable, *argv]
    ranks: list[_Rank] = []
    with (
        _signals_passed_to(ranks) as signals,
        socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
    ):
        shared = {**os.environ, "MLSYS_JOB_KEY": secrets.token_hex(32), **(env or {})}
        shared.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        try:
            for rank in range(num_ranks):
                ranks.append(_start(command, rank, num_ranks, shared, listener))
            listener.close()  # rank 0 has it now: if it dies, the others see a closed port
            return _stay_with(ranks, signals, tolerate_failures=tolerate_failures)
        finally:
            for member in ranks:
                if member.process.poll() is None:
                    member.signal(signal.SIGKILL)
                    member.process.wait()


def _start(
    command: Sequence[str], rank: int, num_ranks: int, shared: Mapping[str, str], listener: socket.socket
) -> _Rank:
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "MLSYS_LAUNCHER": "local",
    }
    if rank == 0:
        variables[LISTEN_FD] = str(listener.fileno())
    process = subprocess.Popen(
        command,
        env={**shared, **variables},
        stdin=subprocess.DEVNULL,
        stderr=None if rank == 0 else subprocess.PIPE,
        pass_fds=[listener.fileno()] if rank == 0 else [],
        process_group=0,
        preexec_fn=_die_with_parent(),  # noqa: PLW1509 (two system calls, no lock, no allocation)
    )
    return _Rank(rank=rank, process=process)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before exec, so that the kernel kills it when this process is gone (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def arm() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)

    return arm


def _stay_with(ranks: list[_Rank], signals: Sequence[int], *, tolerate_failures: bool) -> int:
    """Waits for all ranks, ends them when one fails, gives the job's status; `signals` were passed on.

    With `tolerate_failures` the others go on, and one that ends well makes the job end well.
    """
    ended: list[_Rank] = []
    leave_by: float | None = None
    with selectors.DefaultSelector() as selector:
        for member in ranks:
            if member.process.stderr is not None:
                os.set_blocking(member.process.stderr.fileno(), False)
                selector.register(member.process.stderr, selectors.EVENT_READ, member)
        while len(ended) < len(ranks):
            _drain(selector, _POLL_S)
            now = time.monotonic()
            for member in ranks:
                if member not in ended and member.process.poll() is not None:
                    ended.append(member)
                    if tolerate_failures and member.process.returncode != 0:
                        _tell_of(member, len(ranks), "the others may go on.")
                    elif member.process.returncode not in _statuses_as_asked(signals):
                        leave_by = min(now + _grace_s(member.process.returncode), leave_by or math.inf)
            if leave_by is not None and now > leave_by:
                _end([member for member in ranks if member not in ended], now - leave_by)
        _drain(selector, 0.0)
    if tolerate_failures and any(member.process.returncode == 0 for member in ended):
        return 0
    return _verdict(ended, signals)


def _end(ranks: Sequence[_Rank], overdue_s: float) -> None:
    """Asks ranks that should have left to go, and soon no longer asks."""
    number = signal.SIGTERM if overdue_s < _KILL_S - _LEAVE_S else signal.SIGKILL
    for member in ranks:
        member.signal(number)


def _grace_s(status: int) -> float:
    """How long the others may take to leave by themselves after one ended with `status`."""
    if status in _statuses_as_asked(_FORWARDED):
        return _STOP_S
    return _CULPRIT_S if status == SURVIVOR_STATUS else _LEAVE_S


def _statuses_as_asked(signals: Sequence[int]) -> set[int]:
    """What a rank that did what it was told ends with: 0, or 128 + n after signal n."""
    return {0, *(128 + number for number in signals)}


def _drain(selector: selectors.BaseSelector, timeout_s: float) -> None:
    """Takes what the ranks wrote; waits at most `timeout_s` for something to come."""
    if not selector.get_map():
        time.sleep(timeout_s)
        return
    for key, _ in selector.select(timeout_s):
        stream = key.fileobj
        with contextlib.suppress(BlockingIOError):
            if not key.data.read(stream):
                selector.unregister(stream)


def _verdict(ended: list[_Rank], signals: Sequence[int]) -> int:
    """Names the culprit, shows what it wrote, and returns its status; `ended` is in order of ending."""
    failed = [member for member in ended if member.process.returncode != 0]
    statuses = {member.process.returncode for member in ended}
    if statuses <= _statuses_as_asked(signals):
        return max(statuses)
    if len(statuses) == 1 and statuses <= _statuses_as_asked(_FORWARDED):
        return max(statuses)  # a signal that one rank got, and on which all agreed
    culprit = next((member for member in failed if member.process.returncode != SURVIVOR_STATUS), failed[0])
    code = culprit.process.returncode
    status = 128 - code if code < 0 else code
    for line in bytes(culprit.stderr).decode(errors="replace").splitlines():
        sys.stderr.write(f"[rank {culprit.rank}] {line}\n")
    if len(ended) > 1 and status != 2:
        _tell_of(culprit, len(ended), "all ranks have ended.")
    sys.stderr.flush()
    return status


def _tell_of(culprit: _Rank, num_ranks: int, consequence: str) -> None:
    code = culprit.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit status {code}"
    sys.stderr.write(f"mlsys: rank {culprit.rank} of {num_ranks} {how}; {consequence}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _signals_passed_to(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Passes the signals that end a job on to its ranks (after the first as SIGKILL) and lists what came."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for member in ranks:
            if member.process.returncode is None:
                member.signal(number if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
