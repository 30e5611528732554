"""One rank fails, all leave: the culprit's traceback once, a status other than 0, nobody left behind."""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launchers import LAUNCHERS, LOOK_S, alive, command_of, environment, wait_for_file

FAIL = str(Path(__file__).parent / "programs" / "fail_on_one_rank.py")
# Far below every timeout that would end a hang by itself (60 s), far above what leaving takes (under 1 s).
HANG_S = 20.0
# torchrun takes seconds to start and to end, so beside the exception it is tried in the long tests.
MOSTLY_LONG = [
    pytest.param("torchrun", marks=pytest.mark.slow) if name == "torchrun" else name for name in LAUNCHERS
]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a job ended in which one rank failed; `leave_s` is from the failure to the last rank's end."""

    status: int
    stderr: str
    leave_s: float


def _run(launcher: str, num_ranks: int, culprit: int, kind: str, folder: Path) -> Failure:
    program = [FAIL, str(culprit), kind, str(folder)]
    with tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(command_of(launcher, num_ranks, program), env=environment(), stderr=err)
        try:
            failed_at = float(wait_for_file(folder / "failed_at"))
            pids = [int((folder / f"pid{rank}").read_text()) for rank in range(num_ranks)]
            while any(alive(pid) for pid in pids):
                assert time.time() - failed_at < HANG_S, "a rank did not leave"
                time.sleep(LOOK_S)
            leave_s = time.time() - failed_at
            status = job.wait(HANG_S * 3)  # torchrun itself takes seconds to end
        finally:
            job.kill()
            job.wait()
        err.seek(0)
        return Failure(status=status, stderr=err.read(), leave_s=leave_s)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_exception_on_one_rank_ends_all_with_one_traceback(
    launcher: str, tmp_path: Path, record_property
) -> None:
    failure = _run(launcher, 2, 1, "exception", tmp_path)
    record_property("leave_s", failure.leave_s)
    assert failure.status != 0
    assert failure.stderr.count("RuntimeError: the culprit's own words") == 1
    assert failure.stderr.count('raise RuntimeError("the culprit') == 1
    assert "AssertionError" not in failure.stderr


@pytest.mark.parametrize("launcher", MOSTLY_LONG)
def test_a_users_mistake_on_one_rank_is_told_once_without_a_traceback(launcher: str, tmp_path: Path) -> None:
    failure = _run(launcher, 2, 1, "user_error", tmp_path)
    assert failure.stderr.count("bucket_mib=-1. It must be above 0. Leave it out.") == 1
    assert "fail_on_one_rank.py" not in failure.stderr.replace(FAIL, "") or launcher == "torchrun"
    assert failure.status == (1 if launcher == "torchrun" else 2)  # torchrun has its own status


@pytest.mark.parametrize("kind", ["kill", "exit"])
@pytest.mark.parametrize("launcher", MOSTLY_LONG)
def test_a_rank_that_dies_without_a_word_ends_all(launcher: str, kind: str, tmp_path: Path) -> None:
    failure = _run(launcher, 2, 1, kind, tmp_path)
    assert failure.status != 0
    assert "AssertionError" not in failure.stderr


def test_rank_0_which_hosts_the_store_may_be_the_culprit(tmp_path: Path) -> None:
    failure = _run("local", 3, 0, "exception", tmp_path)
    assert failure.status == 1
    assert failure.stderr.count("RuntimeError: the culprit's own words") == 1


def test_the_local_launcher_returns_the_culprits_status_among_several_ranks(tmp_path: Path) -> None:
    assert _run("local", 3, 2, "exit", tmp_path).status == 7
