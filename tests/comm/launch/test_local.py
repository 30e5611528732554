"""`launch_local`, with ranks that are tiny programs: what it passes, returns, prints and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mlsys_engine.comm.launch import launch_local
from mlsys_engine.errors import LaunchError
from tests.support.launchers import LOOK_S, alive, wait_for_file

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _program(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "program.py"
    header = "import json, os, pathlib, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    folder = f"folder = pathlib.Path({str(tmp_path)!r})\n"
    path.write_text(header + folder + textwrap.dedent(body))
    return [str(path)]


def test_ranks_get_their_variables_and_success_is_zero(tmp_path: Path) -> None:
    program = _program(tmp_path, "(folder / f'env{rank}').write_text(json.dumps(dict(os.environ)))")
    assert launch_local(program, 3, env={"EXTRA": "1"}) == 0
    seen = [json.loads((tmp_path / f"env{rank}").read_text()) for rank in range(3)]
    for rank, env in enumerate(seen):
        assert (env["RANK"], env["WORLD_SIZE"]) == (str(rank), "3")
        assert (env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == (str(rank), "3")
        assert (env["MLSYS_LAUNCHER"], env["MASTER_ADDR"], env["EXTRA"]) == ("local", "127.0.0.1", "1")
    assert len({env["MLSYS_JOB_KEY"] for env in seen}) == 1
    assert len(bytes.fromhex(seen[0]["MLSYS_JOB_KEY"])) == 32
    assert len({env["MASTER_PORT"] for env in seen}) == 1


def test_the_job_key_differs_between_jobs_and_is_in_no_argument(tmp_path: Path) -> None:
    body = """
    key = os.environ["MLSYS_JOB_KEY"]
    arguments = pathlib.Path("/proc/self/cmdline").read_text()
    assert key not in arguments
    with open(folder / "keys", "a") as file:
        file.write(key + "\\n")
    """
    program = _program(tmp_path, body)
    assert launch_local(program, 1) == launch_local(program, 1) == 0
    assert len(set((tmp_path / "keys").read_text().split())) == 2


@pytest.mark.parametrize(("how", "status"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_the_culprits_status_is_returned_and_the_others_are_killed(
    tmp_path: Path, how: str, status: int
) -> None:
    body = f"""
    (folder / f"pid{{rank}}").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while not (folder / "pid0").exists() or not (folder / "pid2").exists():
        time.sleep(0.01)
    if rank == 1:
        {how}
    signal.pause()
    """
    assert launch_local(_program(tmp_path, body), 3) == status
    for rank in (0, 2):
        assert not alive(int((tmp_path / f"pid{rank}").read_text()))


def test_only_the_culprits_stderr_is_shown_under_its_rank(tmp_path: Path, capfd) -> None:
    body = """
    print(f"rank {rank} wrote this", file=sys.stderr, flush=True)
    if rank == 1:
        sys.exit(5)
    sys.exit(75 if rank == 2 else 0)
    """
    assert launch_local(_program(tmp_path, body), 3) == 5
    shown = capfd.readouterr().err
    assert "[rank 1] rank 1 wrote this" in shown
    assert "rank 2 wrote this" not in shown
    assert "rank 1 of 3 failed with exit status 5" in shown


def test_a_rank_that_left_because_of_another_is_not_the_culprit(tmp_path: Path) -> None:
    body = """
    if rank == 0:
        sys.exit(75)
    while pathlib.Path(f"/proc/{os.getppid()}").exists() and not (folder / "go").exists():
        (folder / "go").touch()
    sys.exit(3)
    """
    assert launch_local(_program(tmp_path, body), 2) == 3


def test_a_long_stderr_neither_blocks_the_rank_nor_fills_memory(tmp_path: Path) -> None:
    assert launch_local(_program(tmp_path, "sys.stderr.write('x' * (8 << 20))"), 2) == 0


def test_fewer_than_one_rank_is_refused() -> None:
    with pytest.raises(LaunchError, match="0 ranks"):
        launch_local(["-c", "pass"], 0)


def _launcher(tmp_path: Path, body: str) -> subprocess.Popen[bytes]:
    """`launch_local` of two such ranks in a process of its own, which a test may signal."""
    program = _program(tmp_path, body)
    # It dies with the test run, however that ends, and its ranks with it.
    code = (
        f"import ctypes\nctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}, 0, 0, 0)\n"
        f"from mlsys_engine.comm.launch import launch_local\nraise SystemExit(launch_local({program!r}, 2))"
    )
    root = str(Path(__file__).resolve().parents[3])
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_may_finish_after_a_signal_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    body = f"""
    def save(number, frame):
        (folder / f"saved{{rank}}").write_text("yes")
        sys.exit(0)
    signal.signal({int(number)}, save)
    (folder / f"pid{{rank}}").write_text(str(os.getpid()))
    while True:
        signal.pause()
    """
    launcher = _launcher(tmp_path, body)
    for rank in range(2):
        wait_for_file(tmp_path / f"pid{rank}")
    launcher.send_signal(number)
    assert launcher.wait(60) == 0
    assert {(tmp_path / f"saved{rank}").read_text() for rank in range(2)} == {"yes"}


def test_a_rank_that_leaves_as_the_signal_asked_gives_the_others_time_to_save(tmp_path: Path) -> None:
    body = """
    def leave(number, frame):
        while rank == 0 and not (folder / "the other has left").exists():
            time.sleep(0.01)
        sys.exit(128 + number)
    signal.signal(signal.SIGINT, leave)
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    while True:
        signal.pause()
    """
    launcher = _launcher(tmp_path, body)
    pids = [int(wait_for_file(tmp_path / f"pid{rank}")) for rank in range(2)]
    launcher.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 60
    while alive(pids[1]):
        assert time.monotonic() < deadline, "a rank did not leave"
        time.sleep(LOOK_S)
    (tmp_path / "the other has left").touch()
    assert launcher.wait(60) == 130


def test_ranks_that_all_leave_after_a_signal_to_one_of_them_did_not_fail(tmp_path: Path, capfd) -> None:
    body = """
    (folder / f"ready{rank}").touch()
    while not all((folder / f"ready{other}").exists() for other in range(2)):
        time.sleep(0.01)
    sys.exit(128 + signal.SIGUSR1)
    """
    assert launch_local(_program(tmp_path, body), 2) == 128 + signal.SIGUSR1
    assert "failed" not in capfd.readouterr().err


def test_ranks_die_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    body = """
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    while True:
        signal.pause()
    """
    launcher = _launcher(tmp_path, body)
    pids = [int(wait_for_file(tmp_path / f"pid{rank}")) for rank in range(2)]
    launcher.kill()
    launcher.wait(60)
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(LOOK_S)
