"""The recorder, its dumps, and what is read out of them, from real runs that went wrong."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from contextlib import redirect_stdout, suppress

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.cli.main import main
from mlsys_engine.comm.environment import recorder_settings
from mlsys_engine.comm.hang import PREFIX, diagnose, read_dumps
from mlsys_engine.errors import CollectiveMismatchError, CollectiveTimeoutError, ConfigError, LaunchError
from tests.support.ranks import run_ranks_collecting


def _store():
    return dist.distributed_c10d._get_default_store()


def _healthy(rank, world_size, folder):
    comm.all_reduce(torch.ones(2, 3))
    dist.all_gather([torch.empty(4) for _ in range(world_size)], torch.ones(4))
    comm.all_gather(torch.empty(2 * world_size, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    comm.barrier()
    work = dist.all_reduce(torch.ones(1), async_op=True)
    work.wait()
    if rank == 0:
        comm.send(torch.ones(3), 1)
    elif rank == 1:
        dist.recv(torch.empty(3), 0)
    assert comm.dump(folder).name == f"{PREFIX}{rank}"


def test_a_dump_tells_what_was_called_with_sizes_dtypes_and_state(run_ranks, tmp_path):
    run_ranks(_healthy, 2, str(tmp_path))
    first, second = read_dumps(tmp_path)
    assert (first.rank, second.rank, first.world_size) == (0, 1, 2)
    names = ["all_reduce", "all_gather", "all_gather_into_tensor", "barrier", "all_reduce"]
    operations = [op for op in first.operations if not op.is_message]
    assert [op.name for op in operations] == names
    assert [op.sequence for op in operations] == [1, 2, 3, 4, 5]
    assert operations[0].input_sizes == ((2, 3),)
    assert operations[2].dtypes == ("Int",)
    assert all(op.completed and op.created_ns <= op.started_ns <= op.completed_ns for op in first.operations)
    (sent,) = [op for op in first.operations if op.is_message]
    (received,) = [op for op in second.operations if op.is_message]
    assert (sent.name, sent.source, sent.destination) == ("send", 0, 1)
    assert (received.name, received.source, received.destination) == ("recv", 0, 1)
    assert diagnose([first, second]).verdict.startswith("No operation was under way")


def test_torchs_flight_recorder_analyses_the_dumps(run_ranks, tmp_path):
    run_ranks(_healthy, 2, str(tmp_path))
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(tmp_path)]
    done = subprocess.run([*command, "-o", str(tmp_path / "db")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _types, database = pickle.loads((tmp_path / "db").read_bytes())
    assert [call.pass_check for call in database.collectives] == [True] * len(database.collectives)
    assert len(database.collectives) >= 5
    assert {member.global_rank for member in database.memberships} == {0, 1}


def _skips(rank, world_size):
    comm.barrier()
    if rank == 1:
        _store().wait(["rank 0 gave up"])
        return
    with pytest.raises(CollectiveTimeoutError):
        comm.barrier(timeout_s=0.1)
    _await_dump_of(1)
    _store().set("rank 0 gave up", "")


def _await_dump_of(rank):
    path = f"{os.environ['MLSYS_HANG_DIR']}/{PREFIX}{rank}"
    while not os.path.exists(path):
        os.sched_yield()


def test_one_ranks_timeout_makes_all_dump_and_the_absent_one_is_named(run_ranks, tmp_path):
    run_ranks(_skips, 2, env={"MLSYS_HANG_DIR": str(tmp_path)})
    diagnosis = diagnose(read_dumps(tmp_path))
    assert diagnosis.verdict.startswith("Rank 1 did not come to barrier number 2 of group")
    (group,) = diagnosis.groups
    assert group.completed_by_all == "barrier number 1"
    assert any("its last call here was barrier number 1, completed" in line for line in group.findings)


def _mismatch(rank, world_size, kind):
    comm.barrier()
    tensor = torch.ones(4 if kind != "shape" or rank else 5)
    with pytest.raises(CollectiveMismatchError) as caught:
        if kind == "operation" and rank:
            comm.broadcast(tensor, 0)
        elif kind == "root":
            comm.broadcast(tensor, rank)
        elif kind == "dtype":
            comm.all_reduce(tensor.to(torch.float64 if rank else torch.float32))
        elif kind == "reduction":
            comm.all_reduce(tensor, op=dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM)
        elif kind == "order" and rank:
            comm.all_gather(torch.empty(4 * world_size), tensor)
            comm.all_reduce(tensor)
        else:
            comm.all_reduce(tensor)
            comm.all_gather(torch.empty(4 * world_size), tensor)
    message = str(caught.value)
    assert "rank 0" in message and ("rank 1" in message or "rank 2" in message), message
    return message


@pytest.mark.parametrize("layout", ["0,0,0", "0,1", "0,0,1"])
def test_every_kind_of_mismatch_is_named_with_both_call_sites(run_ranks, layout):
    size = layout.count(",") + 1
    for kind in ("operation", "shape", "dtype", "root", "order", "reduction"):
        env = {"MLSYS_LOCALITY": layout, "MLSYS_RECORDER_DETAIL": "1"}
        for message in run_ranks(_mismatch, size, kind, env=env):
            sites = message.partition("Called at:")[2]
            for rank in range(size):
                assert f"rank {rank}, " in sites, (kind, message)
            assert sites.count("test_recorder.py:") == size and "in _mismatch" in sites, (kind, message)


def test_without_detail_a_mismatch_asks_nobody_for_call_sites(run_ranks):
    assert all("Called at" not in message for message in run_ranks(_mismatch, 2, "shape"))


def test_a_mismatch_is_the_verdict(run_ranks, tmp_path):
    run_ranks(_mismatch, 2, "shape", env={"MLSYS_HANG_DIR": str(tmp_path)})
    verdict = diagnose(read_dumps(tmp_path)).verdict
    assert (
        verdict.startswith("Mismatch: ranks disagree") and "4 float32" in verdict and "5 float32" in verdict
    )


def _killed(rank, world_size):
    comm.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with suppress(comm.PeerFailedError):
        comm.barrier()


def test_a_killed_rank_is_the_verdict_and_wrote_no_dump(tmp_path):
    run_ranks_collecting(_killed, 3, env={"MLSYS_HANG_DIR": str(tmp_path)})
    diagnosis = diagnose(read_dumps(tmp_path))
    assert diagnosis.missing_ranks == (1,)
    assert diagnosis.verdict.startswith("A rank failed:") and "rank 1" in diagnosis.verdict


def _unanswered(rank, world_size):
    comm.barrier()
    if rank == 0:
        work = dist.irecv(torch.empty(3), 1)
        os.kill(os.getpid(), signal.SIGUSR2)
        _await_dump_of(0)
        _await_dump_of(1)
        _store().set("dumped", "")
        assert not work.is_completed()
    _store().wait(["dumped"])


def test_on_sigusr2_all_ranks_dump_and_a_receive_that_nobody_answers_is_named(run_ranks, tmp_path):
    run_ranks(_unanswered, 2, env={"MLSYS_HANG_DIR": str(tmp_path), "MLSYS_RECORDER_DETAIL": "1"})
    diagnosis = diagnose(read_dumps(tmp_path))
    assert diagnosis.verdict.startswith("A message has no other side: rank 0 waits for a message from rank 1")
    assert "test_recorder.py" in diagnosis.verdict
    assert "its number 1, but rank 1 has sent 0" in diagnosis.verdict


def _full_ring(rank, world_size, folder):
    for _ in range(25):
        comm.barrier()
    comm.dump(folder)


def test_the_ring_keeps_the_last_operations(run_ranks, tmp_path):
    run_ranks(_full_ring, 1, str(tmp_path), env={"MLSYS_RECORDER_ENTRIES": "10"})
    (dump,) = read_dumps(tmp_path)
    assert [op.sequence for op in dump.operations] == list(range(16, 26))


def test_the_recorder_can_be_off(run_ranks, tmp_path):
    run_ranks(_full_ring, 1, str(tmp_path), env={"MLSYS_RECORDER_ENTRIES": "0"})
    (dump,) = read_dumps(tmp_path)
    assert dump.operations == ()


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/exploded",))


@pytest.mark.parametrize(
    "content", [pickle.dumps(_Bomb()), b"", b"garbage", pickle.dumps({"entries": []}), pickle.dumps([1])]
)
def test_a_file_that_is_no_dump_is_refused_and_runs_nothing(tmp_path, content, capsys):
    (tmp_path / f"{PREFIX}0").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as a dump"):
        read_dumps(tmp_path)
    assert main(["doctor", "--hang", str(tmp_path)]) == 2
    assert "dump again" in capsys.readouterr().err
    assert not os.path.exists("/tmp/exploded")


def test_a_folder_without_dumps_is_refused(tmp_path, capsys):
    assert main(["doctor", "--hang", str(tmp_path)]) == 2
    assert main(["doctor", "--hang", str(tmp_path / "missing")]) == 2
    text = capsys.readouterr().err
    assert "holds no dump" in text and "is not a folder" in text


def test_doctor_prints_words_or_json(run_ranks, tmp_path):
    run_ranks(_skips, 2, env={"MLSYS_HANG_DIR": str(tmp_path)})
    with redirect_stdout(io.StringIO()) as out:
        assert main(["doctor", "--hang", str(tmp_path), "--json"]) == 0
    assert '"verdict": "Rank 1 did not come' in out.getvalue()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLSYS_RECORDER_ENTRIES", "many"),
        ("MLSYS_RECORDER_ENTRIES", "-1"),
        ("MLSYS_RECORDER_DETAIL", "yes"),
        ("MLSYS_HANG_DIR", "/proc/nowhere"),
    ],
)
def test_wrong_settings_are_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=name):
        recorder_settings()
