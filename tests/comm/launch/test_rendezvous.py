"""The roll call: all ranks get the same hosts, or the same refusal."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from mlsys_engine.comm.launch.environment import Placement
from mlsys_engine.comm.launch.join import locate
from mlsys_engine.comm.launch.rendezvous import agree
from mlsys_engine.errors import LaunchError

TIMEOUT = timedelta(seconds=60)


def _place(rank: int, world_size: int) -> Placement:
    return Placement(launcher="env", rank=rank, world_size=world_size)


def _roll(
    places: Sequence[Placement], keys: Sequence[str | None], timeout: timedelta = TIMEOUT
) -> list[tuple[str, ...] | LaunchError]:
    """What each rank's `agree` returns or raises; ranks are threads on one store."""
    store = dist.HashStore()

    def one(place: Placement, key: str | None) -> tuple[str, ...] | LaunchError:
        try:
            return agree(store, place, key, timeout)
        except LaunchError as refusal:
            return refusal

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places, keys))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_ranks_get_every_host(world_size: int) -> None:
    answers = _roll([_place(rank, world_size) for rank in range(world_size)], [None] * world_size)
    assert answers == [(socket.gethostname(),) * world_size] * world_size


def test_ranks_that_were_told_different_sizes_are_all_refused() -> None:
    for answer in _roll([_place(0, 2), _place(1, 3)], [None, None]):
        assert isinstance(answer, LaunchError)
        assert "Rank 0 was told of 2 ranks, rank 1 of 3." in answer.given


def test_another_job_key_is_refused_without_telling_it() -> None:
    for answer in _roll([_place(0, 2), _place(1, 2)], ["aa11", "bb22"]):
        assert isinstance(answer, LaunchError)
        assert "Rank 1 has another MLSYS_JOB_KEY" in answer.given
        assert "aa11" not in str(answer)
        assert "bb22" not in str(answer)


def test_a_second_process_with_the_same_rank_is_refused() -> None:
    store = dist.HashStore()
    store.add("claim/1", 1)
    with pytest.raises(LaunchError, match="already joined as rank 1 of 2"):
        agree(store, _place(1, 2), None, TIMEOUT)


def test_ranks_that_stay_away_are_named() -> None:
    [answer] = _roll([_place(0, 3)], [None], timeout=timedelta(milliseconds=100))
    assert isinstance(answer, LaunchError)
    assert "Rank 1, 2 of 3 did not arrive within 0.1 s" in answer.given


def test_local_ranks_are_counted_from_host_names_when_the_launcher_does_not_tell() -> None:
    hosts = ("a", "b", "a", "b", "b")
    assert [locate(_place(rank, 5), hosts) for rank in range(5)] == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_local_ranks_of_the_launcher_win_over_host_names() -> None:
    place = Placement(launcher="torchrun", rank=1, world_size=2, local_rank=0, local_size=1)
    assert locate(place, ("same", "same")) == (0, 1)
