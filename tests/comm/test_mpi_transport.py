"""MLSYS_TRANSPORT=mpi: bytes between hosts through mpi4py's communicator, and launches that are refused."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch.distributed as dist

import mlsys_engine as mls
from mlsys_engine.comm import transport
from mlsys_engine.errors import LaunchError
from tests.support.launchers import mpi_prefix, run_launched

PROGRAMS = Path(__file__).parent / "programs"
LIBRARIES = {"openmpi": "libmpi.so.40", "mpich": "libmpi.so.12"}


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", LIBRARIES)
def test_every_operation_goes_over_mpi_a_killed_rank_is_named_and_the_others_go_on(launcher, tmp_path):
    env = {"MLSYS_TRANSPORT": "mpi", "MLSYS_LOCALITY": "0,0,1,1", "MLSYS_NUM_THREADS": "1"}
    env["MPI4PY_LIBMPI"] = str(mpi_prefix(launcher) / "lib" / LIBRARIES[launcher])
    program, options = [str(PROGRAMS / "over_mpi.py"), str(tmp_path)], ["--enable-recovery"]
    if launcher == "mpich":  # whose option alone gives the others less than a second
        program, options = [str(PROGRAMS / "outlived.py"), *program], ["-disable-auto-cleanup"]
    job = run_launched(launcher, 4, program, env=env, mpirun_options=options, timeout_s=100)
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(reports) == 3, job.stderr
    for report in reports:
        assert report["transports"].endswith("MPI between these 2 hosts")
        assert report["tcp_bytes"] == 0
        assert min(report["mpi_bytes_sent"], report["mpi_bytes_received"]) > 0
        assert (report["named"], report["right_pid"]) == (2, True), report["cause"]
        assert report["later_size"] == 3
        assert report["later_transports"].endswith("MPI between these 2 hosts")
        assert report["later_tcp_bytes"] == 0


def _join_with(rank, world_size, transports):
    """Joins the job with this rank's own setting and returns the refusal."""
    os.environ["MLSYS_TRANSPORT"] = transports[rank]
    with pytest.raises(LaunchError) as refused:
        mls.init(timeout_s=20)
    return str(refused.value)


def test_ranks_that_no_mpi_launcher_started_are_refused_alike(run_ranks):
    for message in run_ranks(_join_with, 2, ["mpi", "mpi"], init=False):
        assert "no MPI launcher started this process" in message
        assert "Start the job with mpirun, or unset MLSYS_TRANSPORT" in message


@pytest.mark.parametrize("transports", [["tcp", "mpi"], ["mpi", ""]])
def test_ranks_with_different_transports_are_refused_alike(run_ranks, transports):
    first, second = (name or "tcp" for name in transports)
    for message in run_ranks(_join_with, 2, transports, init=False):
        assert f"Rank 0 has MLSYS_TRANSPORT={first} and rank 1 {second}." in message


def _fake_mpi(rank=0, size=2, *, level=3, finalized=False):
    """As much of mpi4py.MPI as is asked before a group uses it."""
    mpi = ModuleType("mpi4py.MPI")
    world = SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: size, Get_attr=lambda _key: 32767)
    vars(mpi).update(COMM_WORLD=world, THREAD_MULTIPLE=3, TAG_UB=0)
    vars(mpi).update(Query_thread=lambda: level, Is_finalized=lambda: finalized)
    vars(mpi).update(Get_library_version=lambda: "Some MPI 1.0")
    return mpi


def _refusal(monkeypatch, mpi, other=None):
    """What group rank 0 of 2 says when it finds this mpi4py; `other` is what rank 1 has told."""
    monkeypatch.setenv("MLSYS_TRANSPORT", "mpi")
    monkeypatch.setenv("PMI_SIZE", "2")
    package = None if mpi is None else ModuleType("mpi4py")
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)
    store = dist.HashStore()
    told = {"transport": "mpi", "rank": 1, "tag": 0} if other is None else other
    store.set("mlsys/g/transport/1", json.dumps(told))
    store.add("mlsys/g/transport/read", 1)  # rank 1 has read the answer
    options = SimpleNamespace(
        group_id="g",
        group_rank=0,
        group_size=2,
        store=store,
        global_ranks_in_group=[],
        timeout=timedelta(seconds=10),
    )
    with pytest.raises(LaunchError) as refused:
        transport.prepare(options)
    return str(refused.value)


def test_a_missing_mpi4py_is_told_with_the_command_that_installs_it(monkeypatch):
    message = _refusal(monkeypatch, None)
    assert 'pip install "mpi4py>=4.1"' in message
    assert "unset MLSYS_TRANSPORT for TCP" in message


def test_an_mpi4py_of_another_mpi_than_the_launcher_is_refused(monkeypatch):
    message = _refusal(monkeypatch, _fake_mpi(size=1))
    assert "a group of 2 ranks, but MPI.COMM_WORLD is rank 0 of 1 (library: Some MPI 1.0)" in message


def test_a_thread_level_below_multiple_is_refused(monkeypatch):
    message = _refusal(monkeypatch, _fake_mpi(level=1))
    assert "thread level 1" in message


def test_a_finalised_mpi_is_refused(monkeypatch):
    assert "has been finalised" in _refusal(monkeypatch, _fake_mpi(finalized=True))


def test_more_mpi_ranks_than_the_job_has_are_refused(monkeypatch):
    assert "mpirun started 3 ranks, and the job has 2" in _refusal(monkeypatch, _fake_mpi(size=3))


def test_tags_that_are_used_up_are_refused(monkeypatch):
    monkeypatch.setattr(transport._process, "next_tag", 32767 - 10)
    assert "used all message tags" in _refusal(monkeypatch, _fake_mpi())


def test_ranks_of_two_mpiruns_are_refused(monkeypatch):
    other = {"transport": "mpi", "rank": 0, "tag": 0}
    message = _refusal(monkeypatch, _fake_mpi(), other)
    assert "ranks 0 and 1 are both rank 0 of MPI's world" in message


def test_what_one_member_cannot_is_told_by_all(monkeypatch):
    other = {"transport": "mpi", "refusal": ["Rank 1 has none.", "All need it.", "Install it."]}
    assert _refusal(monkeypatch, _fake_mpi(), other) == "Rank 1 has none. All need it. Install it."


def test_members_may_stand_in_any_order_and_take_the_first_tag_that_is_free_for_all():
    members = [{"transport": "mpi", "rank": rank, "tag": tag} for rank, tag in [(3, 17), (0, 34), (2, 0)]]
    assert transport.conclude(members, [5, 6, 7]) == {"ranks": [3, 0, 2], "tag": 34}
    assert transport.conclude([{"transport": "tcp"}] * 2, []) == {}
