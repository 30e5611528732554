"""Telling the other ranks that this one fails."""

from __future__ import annotations

from mlsys_engine.comm.groups import live_groups


def poison(cause: str) -> None:
    """Makes all ranks of this rank's groups raise PeerFailedError naming it and `cause`.

    Called by the launcher's excepthook. Returns at once; this rank's own later operations fail too. Without a
    group it does nothing.
    """
    for group in live_groups():
        group.poison(cause)
