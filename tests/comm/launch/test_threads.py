"""Affinity and thread count: the same under every launcher, and never more than the cgroup grants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mlsys_engine.comm.launch.threads import cpu_quota, fix_affinity, fix_threads, usable_cpus
from mlsys_engine.errors import LaunchError


def _bound_to_one_cpu(rank: int, world_size: int, env: dict[str, str], launched: bool) -> tuple[int, int]:
    """Binds this process as Open MPI does, and returns the number of CPUs before and after."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    return len(before), len(fix_affinity(env, launched=launched))


def test_a_launchers_binding_is_released(run_ranks) -> None:
    [(before, after)] = run_ranks(_bound_to_one_cpu, 1, {}, True, init=False)
    assert after >= before


def test_an_unlaunched_process_stays_where_its_user_bound_it(run_ranks) -> None:
    [(_, after)] = run_ranks(_bound_to_one_cpu, 1, {}, False, init=False)
    assert after == 1


def test_a_binding_is_kept_on_request(run_ranks) -> None:
    [(_, after)] = run_ranks(_bound_to_one_cpu, 1, {"MLSYS_AFFINITY": "keep"}, True, init=False)
    assert after == 1


def test_an_unknown_affinity_choice_is_refused() -> None:
    with pytest.raises(LaunchError, match="MLSYS_AFFINITY"):
        fix_affinity({"MLSYS_AFFINITY": "scatter"}, launched=True)


def _threads(
    rank: int, world_size: int, env: dict[str, str], num_cpus: int, local_size: int
) -> tuple[int, int]:
    return fix_threads(env, num_cpus=num_cpus, local_size=local_size), torch.get_num_threads()


@pytest.mark.parametrize(
    ("env", "num_cpus", "local_size", "expected"),
    [({}, 8, 2, 4), ({}, 8, 3, 2), ({}, 2, 4, 1), ({"MLSYS_NUM_THREADS": "3"}, 8, 2, 3)],
)
def test_threads_are_an_equal_share_or_what_the_user_asks(
    run_ranks, env: dict[str, str], num_cpus: int, local_size: int, expected: int
) -> None:
    [told] = run_ranks(_threads, 1, env, num_cpus, local_size, init=False)
    assert told == (expected, expected)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_an_impossible_number_of_threads_is_refused(value: str) -> None:
    with pytest.raises(LaunchError, match="MLSYS_NUM_THREADS"):
        fix_threads({"MLSYS_NUM_THREADS": value}, num_cpus=2, local_size=1)


def _cgroups(tmp_path: Path, limits: dict[str, str], below: str) -> tuple[Path, Path]:
    root = tmp_path / "cgroup"
    for folder, limit in limits.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "cpu.max").write_text(limit)
    membership = tmp_path / "membership"
    membership.write_text(f"1:name=systemd:/ignored\n0::/{below}\n")
    return root, membership


def test_the_tightest_quota_on_the_way_to_the_root_counts_rounded_up(tmp_path: Path) -> None:
    limits = {"a/b": "max 100000\n", "a": "250000 100000\n", ".": "800000 100000\n"}
    root, membership = _cgroups(tmp_path, limits, "a/b")
    assert cpu_quota(root, membership) == 3


def test_without_a_quota_affinity_alone_counts(tmp_path: Path) -> None:
    root, membership = _cgroups(tmp_path, {"a": "max 100000\n"}, "a")
    assert cpu_quota(root, membership) > 100_000
    assert cpu_quota(root, tmp_path / "missing") > 100_000


def test_at_least_one_cpu_is_usable() -> None:
    assert usable_cpus(()) == 1
