"""Signals become requests that all ranks agree on, and the former handlers come back."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from mlsys_engine import checkpoint, tracking
from mlsys_engine.trainer import TrainingInterrupted
from mlsys_engine.trainer.stopping import (
    NO_STOP,
    STOP_BY_CALLBACK,
    Agreement,
    Control,
    SignalWatch,
    signal_of,
)
from tests.trainer.workloads import Journal, Losses, make_loader, make_trainer


def _handlers() -> tuple[Any, Any]:
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    control = Control()
    with SignalWatch(control):
        signal.raise_signal(number)
    assert signal_of(control.request) == number


def test_a_program_that_uses_sigusr1_itself_keeps_it() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    control = Control()
    try:
        with SignalWatch(control):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]
    assert control.request == NO_STOP


def test_the_former_handlers_come_back_also_after_an_exception() -> None:
    before = _handlers()
    with pytest.raises(ZeroDivisionError), SignalWatch(Control()):
        assert _handlers() != before
        raise ZeroDivisionError
    assert _handlers() == before


def test_a_signal_outranks_the_wish_of_a_callback() -> None:
    control = Control()
    with SignalWatch(control):
        signal.raise_signal(signal.SIGTERM)
    control.stop()
    assert signal_of(control.request) == signal.SIGTERM


def test_outside_the_main_thread_handlers_are_left_alone() -> None:
    before, seen = _handlers(), []

    def watch() -> None:
        with SignalWatch(Control()):
            seen.append(_handlers())

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [before]


def _agree(rank: int, world_size: int, asking_rank: int) -> list[int]:
    control = Control()
    agreement = Agreement(control, world_size)
    verdicts = [agreement.at_boundary()]
    if rank == asking_rank:
        control.stop()
    verdicts += [agreement.at_boundary(), agreement.at_boundary(), agreement.final()]
    return verdicts


@pytest.mark.parametrize(("world_size", "asking_rank"), [(1, 0), (2, 1), (3, 0)])
def test_all_ranks_hear_of_a_request_at_the_boundary_after_it(
    run_ranks: Any, world_size: int, asking_rank: int
) -> None:
    expected = [NO_STOP, NO_STOP, STOP_BY_CALLBACK, STOP_BY_CALLBACK]
    assert run_ranks(_agree, world_size, asking_rank) == [expected] * world_size


def _agree_at_the_end(rank: int, world_size: int) -> int:
    control = Control()
    agreement = Agreement(control, world_size)
    agreement.at_boundary()
    if rank == 1:
        control.stop()
    return agreement.final()


def test_a_request_during_the_last_step_is_heard_by_all(run_ranks: Any) -> None:
    assert run_ranks(_agree_at_the_end, 2) == [STOP_BY_CALLBACK] * 2


class _SignalAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, step: int) -> None:
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_an_interrupted_fit_saves_closes_the_record_and_leaves_with_the_signals_status(
    tmp_path: Path,
) -> None:
    before, journal = _handlers(), Journal()
    with pytest.raises(TrainingInterrupted) as caught:
        make_trainer(tmp_path, _SignalAt(3), journal, trackers=("local",)).fit(
            make_loader(), max_steps=9, eval_loader=make_loader()
        )
    assert caught.value.code == 128 + signal.SIGINT
    assert caught.value.checkpoint == tmp_path / "checkpoints" / "step-00000004"
    assert "stopped by SIGINT after step 4, saved in" in str(caught.value)
    assert checkpoint.verify(caught.value.checkpoint).step == 4
    assert journal.events[-2:] == ["saved step-00000004 at 4", "fit_end 4"]
    assert tracking.read_run(tmp_path).status == "interrupted"
    assert _handlers() == before


@pytest.mark.parametrize("step", [4, 5])
def test_a_signal_near_the_last_step_completes_the_training_and_still_leaves(
    tmp_path: Path, step: int
) -> None:
    losses = Losses()
    with pytest.raises(TrainingInterrupted):
        make_trainer(tmp_path, _SignalAt(step), losses, trackers=("local",)).fit(make_loader(), max_steps=5)
    assert len(losses.values) == 5
    assert tracking.read_run(tmp_path).status == "completed"


def _signal_one_rank(rank: int, world_size: int, run_dir: str) -> tuple[int, int]:
    journal = Journal()
    callbacks = [journal, _SignalAt(2)] if rank == world_size - 1 else [journal]
    with pytest.raises(TrainingInterrupted) as caught:
        make_trainer(run_dir, *callbacks).fit(make_loader(), max_steps=9)
    return caught.value.step, int(caught.value.code)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    tmp_path: Path, run_ranks: Any, world_size: int
) -> None:
    assert run_ranks(_signal_one_rank, world_size, str(tmp_path)) == [(3, 130)] * world_size
    assert checkpoint.verify(tmp_path / "checkpoints" / "step-00000003").world_size == world_size
