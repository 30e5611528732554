"""What every tracker in the table promises. A new tracker is tested by its line in TRACKERS alone."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.tracking import TRACKERS, RunInfo, Tracker, make_trackers


def _info(run_dir: Path, resumed_from_step: int | None = None) -> RunInfo:
    return RunInfo(
        run_id="run-1",
        run_dir=run_dir,
        world_size=2,
        backend="mlsys",
        plan_hash="00ff",
        manifest={"code": {"commit": "abc", "diff": ""}, "config": {"steps": 3}},
        baselines={},
        resumed_from_step=resumed_from_step,
    )


@pytest.fixture(params=sorted(TRACKERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_tracker_takes_the_calls_of_the_protocol_by_name(name: str, tmp_path: Path) -> None:
    (tracker,) = make_trackers([name], tmp_path)
    for method in ("start", "log", "finish"):
        expected = list(inspect.signature(getattr(Tracker, method)).parameters)[1:]
        assert list(inspect.signature(getattr(tracker, method)).parameters) == expected


def test_a_tracker_lives_through_a_run_with_odd_metrics(name: str, tmp_path: Path) -> None:
    (tracker,) = make_trackers([name], tmp_path / "run")
    tracker.start(_info(tmp_path / "run"))
    tracker.log(1, {"loss": 2.0, "lr": 1e-3})
    tracker.log(2, {"loss": float("nan"), "grad_norm": float("inf")})
    tracker.log(2, {"val_loss": 2.0})
    tracker.log(3, {})
    tracker.finish("completed", {"val_loss": 2.0})
    tracker.finish("completed", {"val_loss": 2.0})


@pytest.mark.parametrize("status", ["completed", "interrupted", "failed"])
def test_a_tracker_takes_a_run_that_ends_at_once(name: str, status: str, tmp_path: Path) -> None:
    (tracker,) = make_trackers([name], tmp_path)
    tracker.start(_info(tmp_path))
    tracker.finish(status, {})


def test_a_tracker_resumes_a_run(name: str, tmp_path: Path) -> None:
    for resumed_from_step in (None, 1):
        (tracker,) = make_trackers([name], tmp_path)
        tracker.start(_info(tmp_path, resumed_from_step))
        tracker.log(2, {"loss": 1.0})
        tracker.finish("interrupted", {})


def test_importing_a_tracker_by_its_line_gives_the_class_itself(name: str) -> None:
    module, _, attribute = TRACKERS[name].partition(":")
    assert module.startswith("mlsys_engine.tracking.trackers.") and attribute


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'local'\?"):
        make_trackers(["locla"], tmp_path)
    with pytest.raises(ConfigError, match="no tracker named 'wandb'"):
        make_trackers("wandb", tmp_path)


def test_a_tracker_object_is_taken_as_it_is(tmp_path: Path) -> None:
    (mine,) = make_trackers(["local"], tmp_path)
    assert make_trackers(["local", mine], tmp_path)[1] is mine
