"""`reconfigure()`: the ranks that are left after a failure form a smaller job and go on.

The store by which a job started may have died with its rank 0, so the survivors make a new one. They find
each other through the connections of the failed group itself, which stay open until it is destroyed: its
watch threads know who has died, and every rank can leave the others a short notice. The lowest surviving
rank serves the new store, calls the roll in it and publishes the roster; if it dies meanwhile, the next
lowest begins again.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mlsys_engine.comm.groups import native_group
from mlsys_engine.comm.launch import join, rendezvous
from mlsys_engine.comm.launch.world import World
from mlsys_engine.errors import LaunchError

_LOOK_S = 0.005
_MOST_NOTICE = 251
_ANSWER_MARGIN_S = 2.0  # how much longer the others wait for the roster than its writer for them
_LOCALITY = "MLSYS_LOCALITY"


def reconfigure(*, timeout_s: float = 30.0) -> World:
    """Forms a job of the ranks that are left, and returns this rank's new World; each survivor calls it.

    Called after PeerFailedError, CollectiveTimeoutError or CollectiveMismatchError. Ranks are numbered anew,
    densely and in their old order. All process groups of before are destroyed, subgroups too: make them, and
    what was built on them (DataParallel, DistributedDataParallel), again. Tensors and models stay as they
    are; whether all survivors stand at the same step is the caller's to see to.

    A rank that has died is left out at once; one that lives but does not call this within `timeout_s` is left
    out then, and raises LaunchError when it comes later. Raises LaunchError, too, when the group had never
    connected and its store is gone.
    """
    world = join.current_world()
    if world is None:
        raise LaunchError(
            "reconfigure() was called without a job.",
            "It goes on with a job's survivors.",
            "Call mls.init().",
        )
    if world.world_size == 1:
        return world
    deadline = time.monotonic() + timeout_s
    group = native_group()
    store, roster = _meet(group, world, deadline)
    if world.rank not in roster:
        raise LaunchError(
            f"Rank {world.rank} of {world.world_size} came too late: the others went on without it.",
            f"Every survivor calls reconfigure() within its timeout (here {timeout_s:g} s).",
            "End this process; it is no longer part of the job.",
        )
    del group
    dist.destroy_process_group()
    _renumber_faked_hosts(roster)
    return join.rejoin(_shrunk(world, roster), store)


def _meet(group: Any, world: World, deadline: float) -> tuple[dist.Store, list[int]]:
    """The new store and the old ranks that go on with it."""
    if not group.present():
        return _meet_in_the_old_store(world, deadline)
    while True:
        # A host leaves the old group when it has published the roster: then it is too late.
        if any(group.has_left(rank) and group.notice(rank) for rank in range(world.world_size)):
            return dist.HashStore(), []
        host = min(group.present())
        if host == world.rank:
            store = _serve(world, deadline)
            group.post_notice(_notice(world, store.port))
            return store, _call_roll(group.present, store, world, deadline)
        notice = group.notice(host)
        if notice:
            with contextlib.suppress(dist.DistError):  # it died after its notice: the next lowest takes over
                store = _connect(notice, deadline)
                roster = _answer_roll(lambda host=host: host in group.present(), store, world, deadline)
                if roster is not None:
                    return store, roster
        _pause(deadline, f"rank {host}, the lowest that is left, opened no new store")


def _meet_in_the_old_store(world: World, deadline: float) -> tuple[dist.Store, list[int]]:
    """Before the group's first operation nobody knows who lives: who is here when the time is up goes on."""
    old = dist.distributed_c10d._get_default_store()
    try:
        first = old.add("reconfigure/callers", 1) == 1
        if first:
            store = _serve(world, deadline)
            old.set("reconfigure/notice", _notice(world, store.port))
        else:
            old.wait(["reconfigure/notice"], _left(deadline))
            store = _connect(old.get("reconfigure/notice").decode(), deadline)
    except dist.DistError as error:
        raise LaunchError(
            "The group failed before its first operation, and the store by which the ranks met is gone.",
            "Survivors find each other through the connections of the failed group, or through that store.",
            "Start the job again.",
        ) from error
    everyone = list(range(world.world_size))
    if first:
        return store, _call_roll(lambda: everyone, store, world, deadline)
    roster = _answer_roll(lambda: True, store, world, deadline)
    if roster is None:
        raise LaunchError("The new store is gone.", "Its rank serves it.", "Start the job again.")
    return store, roster


def _call_roll(present: Any, store: dist.Store, world: World, deadline: float) -> list[int]:
    """The store's rank waits for all that are present, or for the deadline, and publishes who goes on."""
    here = {world.rank}
    while set(present()) - here and time.monotonic() < deadline:
        here |= {rank for rank in set(present()) - here if store.check([f"here/{rank}"])}
        time.sleep(_LOOK_S)
    roster = sorted(here & set(present()))
    store.set("roster", json.dumps(roster))
    # It may end soon; the store must not go before everybody has read the roster.
    until = time.monotonic() + _ANSWER_MARGIN_S
    while store.add("read", 0) < len(roster) - 1 and set(roster) <= set(present()):
        if time.monotonic() > until:
            break
        time.sleep(_LOOK_S)
    return roster


def _answer_roll(host_is_there: Any, store: dist.Store, world: World, deadline: float) -> list[int] | None:
    """Waits for the roster; None when the store's rank is gone without having written it."""
    store.set(f"here/{world.rank}", "1")
    while True:
        there = host_is_there()  # before the look: it may leave in good order right after it has written
        if store.check(["roster"]):
            roster: list[int] = json.loads(store.get("roster"))
            if world.rank in roster:
                store.add("read", 1)
            return roster
        if not there:
            return None
        _pause(deadline + _ANSWER_MARGIN_S, "no roster of the survivors came")


def _serve(world: World, deadline: float) -> dist.TCPStore:
    return dist.TCPStore(
        "localhost", 0, world.world_size, is_master=True, timeout=_left(deadline), wait_for_workers=False
    )


def _connect(notice: str, deadline: float) -> dist.TCPStore:
    *addresses, port = notice.split()
    address = rendezvous.first_reachable(addresses, int(port))
    return dist.TCPStore(address, int(port), is_master=False, timeout=_left(deadline))


def _notice(world: World, port: int) -> str:
    """Where the new store is: the addresses that fit a notice, then the port."""
    addresses = ["127.0.0.1"] if world.num_hosts == 1 else rendezvous.addresses_of_this_host()
    while len(" ".join([*addresses, str(port)])) > _MOST_NOTICE:
        addresses.pop()
    return " ".join([*addresses, str(port)])


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.1, deadline - time.monotonic()))


def _pause(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise LaunchError(
            f"reconfigure() reached its timeout: {what}.",
            "Every rank that is left calls it.",
            "Look at the other ranks' output; give a longer timeout_s if they need longer to come.",
        )
    time.sleep(_LOOK_S)


def _shrunk(world: World, roster: Sequence[int]) -> World:
    hosts = tuple(world.hosts[rank] for rank in roster)
    rank = roster.index(world.rank)
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    return replace(
        world,
        rank=rank,
        world_size=len(roster),
        hosts=hosts,
        local_rank=here.index(rank),
        local_size=len(here),
    )


def _renumber_faked_hosts(roster: Sequence[int]) -> None:
    """MLSYS_LOCALITY goes by global ranks, which are others now."""
    if os.environ.get(_LOCALITY):
        hosts = os.environ[_LOCALITY].split(",")
        os.environ[_LOCALITY] = ",".join(hosts[rank] for rank in roster)
