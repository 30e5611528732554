"""Waits until what a process wrote to its launcher has been read: a launcher that kills may not read on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import termios
import time

_LOOK_S = 0.002


def wait_until_read(descriptor: int, timeout_s: float) -> None:
    """Returns when nothing that was written to a pipe or a local socket is unread, or when time is up.

    For files and terminals there is nothing to wait for. MPICH's proxies read a rank's output through pipes,
    and look at what MPI_Abort tells them first.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(OSError):  # closed, or a system that cannot tell
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode):
            request = termios.FIONREAD
        elif stat.S_ISSOCK(mode):
            request = termios.TIOCOUTQ
        else:
            return
        while unread_bytes(descriptor, request) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)


def unread_bytes(descriptor: int, request: int) -> int:
    """What the request FIONREAD, for a pipe, or TIOCOUTQ, for a socket, counts."""
    count: int = struct.unpack("i", fcntl.ioctl(descriptor, request, struct.pack("i", 0)))[0]
    return count
