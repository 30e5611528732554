"""The environment variables of the collectives, checked when a group is created."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlsys_engine.errors import LaunchError

JOB_KEY = "MLSYS_JOB_KEY"
LOCALITY = "MLSYS_LOCALITY"
SOCKETS_PER_PEER = "MLSYS_SOCKETS_PER_PEER"
TRANSPORT = "MLSYS_TRANSPORT"
DEFAULT_SOCKETS_PER_PEER, MOST_SOCKETS_PER_PEER = 2, 16
RECORDER_ENTRIES = "MLSYS_RECORDER_ENTRIES"
RECORDER_DETAIL = "MLSYS_RECORDER_DETAIL"
HANG_DIR = "MLSYS_HANG_DIR"


@dataclass(frozen=True, kw_only=True)
class RecorderSettings:
    """What the recorder of the last operations keeps, and where it is dumped when something fails."""

    num_entries: int = 2000
    """Operations that the ring holds; 0 turns it off."""
    detail: bool = False
    """Whether each operation's Python frames are recorded too."""
    hang_dir: str = ""
    """Folder for the dumps; empty for none."""


def job_key() -> str:
    """The job's key in hex, the same on all ranks; empty when the launcher set none."""
    key = os.environ.get(JOB_KEY, "")
    try:
        bytes.fromhex(key)
    except ValueError:
        # The value is a secret: the message does not repeat it.
        raise LaunchError(
            f"{JOB_KEY} is set to {len(key)} characters that are not hex digits.",
            "It proves to a rank's data sockets that a peer belongs to the job, and must be hex.",
            f"Set {JOB_KEY}=$(openssl rand -hex 32) to the same value on all ranks, or unset it.",
        ) from None
    return key


def locality(global_ranks: Iterable[int]) -> list[int]:
    """The host number each global rank is treated as living on; empty when hosts are to be found out."""
    text = os.environ.get(LOCALITY, "").strip()
    if not text:
        return []
    try:
        hosts = [int(part) for part in text.split(",")]
    except ValueError:
        hosts = []
    largest = max(global_ranks, default=0)
    if largest >= len(hosts):
        raise LaunchError(
            f"{LOCALITY}={text!r} is set.",
            f"It needs an integer for each rank of the job, at least {largest + 1}, separated by commas.",
            f'For example {LOCALITY}="0,0,1,1" makes four ranks look like two hosts; unset it outside tests.',
        )
    return hosts


def sockets_per_peer() -> int:
    """How many TCP connections a rank opens to each rank of another host that it exchanges data with."""
    text = os.environ.get(SOCKETS_PER_PEER, "").strip()
    if not text:
        return DEFAULT_SOCKETS_PER_PEER
    if not text.isdecimal() or not 1 <= int(text) <= MOST_SOCKETS_PER_PEER:
        raise LaunchError(
            f"{SOCKETS_PER_PEER}={text!r} is set.",
            f"It is the number of connections between two ranks of different hosts, 1 to "
            f"{MOST_SOCKETS_PER_PEER}, the same on all ranks.",
            f"For example {SOCKETS_PER_PEER}=4; unset it for {DEFAULT_SOCKETS_PER_PEER}.",
        )
    return int(text)


def transport() -> str:
    """What moves payload between hosts: "tcp" (our own sockets, the default) or "mpi"."""
    text = os.environ.get(TRANSPORT, "").strip()
    if text not in ("", "tcp", "mpi"):
        raise LaunchError(
            f"{TRANSPORT}={text!r} is set.",
            "It is tcp (our own sockets, the default) or mpi (the communicator of mpi4py, under mpirun).",
            f"For example {TRANSPORT}=mpi, the same on all ranks; unset it for tcp.",
        )
    return text or "tcp"


def recorder_settings() -> RecorderSettings:
    """The recorder's variables; the folder for dumps exists afterwards."""
    entries = os.environ.get(RECORDER_ENTRIES, "2000")
    if not entries.isdecimal() or int(entries) > 1_000_000:
        raise LaunchError(
            f"{RECORDER_ENTRIES}={entries!r} is set.",
            "It is the number of operations to remember, from 0 (off) to 1000000.",
            f"Unset {RECORDER_ENTRIES} for 2000.",
        )
    detail = os.environ.get(RECORDER_DETAIL, "0")
    if detail not in ("0", "1"):
        raise LaunchError(
            f"{RECORDER_DETAIL}={detail!r} is set.",
            "It is 0 or 1.",
            f"Set {RECORDER_DETAIL}=1 for call sites.",
        )
    folder = os.environ.get(HANG_DIR, "")
    if folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(
                f"{HANG_DIR}={folder!r} is set and cannot be made: {error.strerror}.",
                "Each rank writes its last operations there when something fails.",
                "Name a folder that this user may write.",
            ) from None
    return RecorderSettings(num_entries=int(entries), detail=detail == "1", hang_dir=folder)
