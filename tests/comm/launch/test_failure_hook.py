"""What an uncaught exception makes a rank say, and with which status it leaves."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from mlsys_engine.comm.launch.environment import SharedLaunchError
from mlsys_engine.comm.launch.failure import SURVIVOR_STATUS, FailureHook, describe, peer_failure
from mlsys_engine.errors import ConfigError, NativeBuildError, PeerFailedError


class _Left(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch):
    """Lets hooks handle errors without ending this process; returns a function giving the exit status."""

    def end(status: int) -> None:
        raise _Left(status)

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def handle(hook: FailureHook, error: BaseException) -> int:
        with pytest.raises(_Left) as left:
            hook(type(error), error, error.__traceback__)
        return int(left.value.args[0])

    return handle


def _hook(rank: int | None, store: dist.Store | None = None, world_size: int = 2) -> FailureHook:
    return FailureHook(
        rank=rank, world_size=world_size, host="here", store=store, previous=sys.__excepthook__
    )


def _peer_failed() -> PeerFailedError:
    return PeerFailedError(3, "there", 42, "RuntimeError: boom\nand more", "all_reduce", 7)


def _raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_first_to_fail_shows_its_traceback_and_the_next_one_line(leave, capsys) -> None:
    store = dist.HashStore()
    assert leave(_hook(1, store), _raised(RuntimeError("first"))) == 1
    shown = capsys.readouterr().err
    assert "rank 1 of 2 on here" in shown
    assert "Traceback" in shown
    assert "RuntimeError: first" in shown
    assert leave(_hook(0, store), _raised(RuntimeError("second"))) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "failed, too: RuntimeError: second" in shown


def test_a_users_mistake_is_told_by_one_rank_without_a_traceback(leave, capsys) -> None:
    store = dist.HashStore()
    error = ConfigError("lr=-1.", "It must be above 0.", "Leave it out.")
    assert [leave(_hook(rank, store), _raised(error)) for rank in (1, 0)] == [2, 2]
    assert capsys.readouterr().err == "mlsys: lr=-1. It must be above 0. Leave it out.\n"


def test_a_victim_prints_one_line_and_has_its_own_status(leave, capsys) -> None:
    assert leave(_hook(0, dist.HashStore()), _peer_failed()) == SURVIVOR_STATUS
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "rank 3 on there failed (RuntimeError).\n" in shown
    assert "boom" not in shown


def test_a_contradiction_that_all_ranks_meet_is_told_by_rank_0(leave, capsys) -> None:
    error = SharedLaunchError("PMI_SIZE=2.", "MPI has 1.", "Use one MPI.")
    assert leave(_hook(1), error) == 2
    assert capsys.readouterr().err == ""
    assert leave(_hook(0), error) == 2
    assert "PMI_SIZE=2." in capsys.readouterr().err


def test_before_the_ranks_meet_every_rank_tells_its_own_error(leave, capsys) -> None:
    assert leave(_hook(1), ConfigError("x=1.", "It is 2.", "Set x=2.")) == 2
    assert "x=1." in capsys.readouterr().err


def test_an_interactive_session_is_not_ended(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    error = _raised(RuntimeError("typed by hand"))
    _hook(0)(RuntimeError, error, error.__traceback__)
    assert "typed by hand" in capsys.readouterr().err


def test_an_interrupt_needs_no_traceback() -> None:
    assert describe(KeyboardInterrupt(), None) == (130, "Interrupted.\n")


def test_a_peers_failure_is_found_behind_what_was_raised_because_of_it() -> None:
    failed = _peer_failed()
    outer = RuntimeError("while training")
    outer.__cause__ = ValueError("in between")
    outer.__cause__.__context__ = failed
    assert peer_failure(outer) is failed
    assert peer_failure(RuntimeError("alone")) is None


def test_a_circle_of_causes_ends() -> None:
    one, two = RuntimeError("one"), RuntimeError("two")
    one.__cause__, two.__cause__ = two, one
    assert peer_failure(one) is None


def test_an_extension_that_is_not_built_is_told_without_a_traceback() -> None:
    assert describe(_raised(NativeBuildError("Not built. Type: make")), None) == (
        2,
        "mlsys: Not built. Type: make\n",
    )
