"""The environment variables of the collectives, checked when a group is created."""

from __future__ import annotations

import os
from collections.abc import Iterable

from mlsys_engine.errors import LaunchError

JOB_KEY = "MLSYS_JOB_KEY"
LOCALITY = "MLSYS_LOCALITY"
SOCKETS_PER_PEER = "MLSYS_SOCKETS_PER_PEER"
DEFAULT_SOCKETS_PER_PEER, MOST_SOCKETS_PER_PEER = 2, 16


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
