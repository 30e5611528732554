"""Connections from outside the job to every listener of its ranks: garbage, replays, slow and silent ones."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import random
import socket
import struct
from collections import deque
from collections.abc import Sequence
from pathlib import Path

KINDS = ["garbage", "truncated", "replayed", "wrong proof", "slow", "oversized", "silent"]
_HELLO = struct.Struct("<IHHiiQ16s8x")  # csrc/comm/auth/handshake.h
_MOST_OPEN = 200  # of the connections that are kept open, the oldest is closed for the next

Address = tuple[str, int] | str
"""A TCP address, or the name of an abstract unix socket."""


def listeners_of_this_process() -> list[Address]:
    """Where a rank can be called: its TCP ports on loopback and its abstract unix sockets."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found: list[Address] = []
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            found.append(("127.0.0.1", int(fields[1].partition(":")[2], 16)))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes and fields[7].startswith("@mlsys-"):
            found.append(fields[7][1:])
    return found


class Crowd:
    """Knocks at the given doors, again and again; deterministic in its seed."""

    def __init__(self, doors: Sequence[Address], *, group: str, size: int, seed: int = 0) -> None:
        self._doors = list(doors)
        self._choose = random.Random(seed)
        digest = hashlib.sha256(group.encode()).digest()
        self._group, self._size = int.from_bytes(digest[:8], "little"), size
        self._open: deque[socket.socket] = deque()
        self.num_knocks = 0

    def knock(self, times: int) -> None:
        for _ in range(times):
            kind = KINDS[self.num_knocks % len(KINDS)]
            door = self._doors[self.num_knocks // len(KINDS) % len(self._doors)]
            self.num_knocks += 1
            # The listener may be full, or hang up in the middle: all that is asked is that the job goes on.
            with contextlib.suppress(OSError):
                self._knock(kind, door)

    def close(self) -> None:
        while self._open:
            self._open.popleft().close()

    def _knock(self, kind: str, door: Address) -> None:
        connection = socket.socket(socket.AF_UNIX if isinstance(door, str) else socket.AF_INET)
        connection.settimeout(0.05)
        self._open.append(connection)
        connection.connect("\0" + door if isinstance(door, str) else door)
        while len(self._open) > _MOST_OPEN:
            self._open.popleft().close()
        hello = _HELLO.pack(0x48534C4D, 1, 4, 0, self._size, self._group, self._choose.randbytes(16))
        if kind == "garbage":
            connection.sendall(self._choose.randbytes(self._choose.randrange(1, 400)))
            self._hang_up()
        elif kind == "truncated":
            connection.sendall(hello[: self._choose.randrange(1, len(hello))])
            self._hang_up()
        elif kind == "oversized":
            connection.sendall(bytes(1 << 16))
            self._hang_up()
        elif kind == "slow":
            connection.sendall(hello[:1])
        elif kind in ("replayed", "wrong proof"):
            connection.sendall(hello)
            # What an eavesdropper has: a proof that was right for another challenge.
            key = os.environ["MLSYS_JOB_KEY"] if kind == "replayed" else "another key"
            old = hmac.digest(key.encode(), b"caller" + hello + self._choose.randbytes(16), "sha256")
            connection.sendall(struct.pack("<I", 0x50534C4D) + old)

    def _hang_up(self) -> None:
        self._open.pop().close()
