from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.tracking import RunInfo, read_run
from mlsys_engine.tracking.trackers.local import LocalTracker

_BASELINES = {"bigram": {"bits_per_byte": 3.47}}


def _info(run_dir: Path, resumed_from_step: int | None = None, **code: Any) -> RunInfo:
    return RunInfo(
        run_id="run-1",
        run_dir=run_dir,
        world_size=2,
        backend="mlsys",
        plan_hash="00ff",
        manifest={
            "code": {"commit": "abc", "dirty": False, "diff": "", **code},
            "data": {"fingerprint": "f0", "unit": "byte"},
            "config": {"steps": 4},
        },
        baselines=_BASELINES,
        resumed_from_step=resumed_from_step,
    )


def _train(run_dir: Path, steps: range, info: RunInfo, status: str = "completed") -> None:
    tracker = LocalTracker(run_dir)
    tracker.start(info)
    for step in steps:
        tracker.log(step, {"loss": 1.0 / step})
    tracker.log(steps[-1], {"val_loss": 0.5, "val_bits_per_byte": 0.72})
    tracker.finish(status, {"val_bits_per_byte": 0.72})


def test_a_finished_run_holds_what_the_record_promises(tmp_path: Path) -> None:
    _train(tmp_path, range(1, 5), _info(tmp_path))
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["id"], run["status"], run["steps"], run["world_size"]) == ("run-1", "completed", 4, 2)
    assert (run["backend"], run["plan_hash"]) == ("mlsys", "00ff")
    assert run["metrics"]["val_bits_per_byte"] == 0.72
    assert run["baselines"]["bigram"]["bits_per_byte"] == 3.47
    assert run["manifest"]["code"]["commit"] == "abc"
    assert run["manifest"]["data"]["fingerprint"] == "f0"
    assert json.loads((tmp_path / "manifest.json").read_text()) == run["manifest"]
    assert [row["step"] for row in read_run(tmp_path).read_metrics().rows] == [1, 2, 3, 4, 4]
    ElementTree.parse(tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_the_record_and_the_picture_exist_while_the_run_goes_on(tmp_path: Path) -> None:
    tracker = LocalTracker(tmp_path)
    tracker.start(_info(tmp_path))
    assert read_run(tmp_path).status == "running"
    tracker.log(1, {"loss": 2.0})
    tracker.log(1, {"val_loss": 2.0})
    assert read_run(tmp_path).metrics["val_loss"] == 2.0
    assert (tmp_path / "loss.svg").exists()


def test_the_diff_lives_in_its_own_file(tmp_path: Path) -> None:
    _train(tmp_path, range(1, 2), _info(tmp_path, diff="--- a\n+++ b\n", diff_sha256="d1"))
    code = read_run(tmp_path).manifest["code"]
    assert (tmp_path / code["diff_file"]).read_text() == "--- a\n+++ b\n"
    assert "diff" not in code and code["diff_sha256"] == "d1"


def test_a_resumed_run_goes_on_in_the_same_files_and_forgets_what_is_taken_again(tmp_path: Path) -> None:
    _train(tmp_path, range(1, 8), _info(tmp_path, diff="old"), status="interrupted")
    created = read_run(tmp_path).created
    _train(tmp_path, range(4, 10), _info(tmp_path, resumed_from_step=3, diff="new"))
    record = read_run(tmp_path)
    assert record.read_metrics().series("loss") == [(step, 1.0 / step) for step in range(1, 10)]
    assert (record.created, record.status, record.fields["steps"]) == (created, "completed", 9)
    assert [segment["from_step"] for segment in record.fields["segments"]] == [0, 3]
    assert (tmp_path / "code.diff").read_text() == "new"
    assert (tmp_path / "code.before-step-3.diff").read_text() == "old"


def test_a_resumed_run_with_nothing_left_to_train_keeps_its_metrics(tmp_path: Path) -> None:
    _train(tmp_path, range(1, 8), _info(tmp_path))
    tracker = LocalTracker(tmp_path)
    tracker.start(_info(tmp_path, resumed_from_step=7))
    tracker.finish("completed", {})
    assert read_run(tmp_path).fields["metrics"]["loss"] == 1.0 / 7


def test_a_run_that_died_before_its_first_checkpoint_starts_over_in_its_folder(tmp_path: Path) -> None:
    _train(tmp_path, range(1, 8), _info(tmp_path), status="failed")
    _train(tmp_path, range(1, 3), _info(tmp_path))
    assert read_run(tmp_path).read_metrics().last_step == 2


def test_a_completed_run_is_not_overwritten(tmp_path: Path) -> None:
    _train(tmp_path, range(1, 3), _info(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds the completed run run-1"):
        LocalTracker(tmp_path).start(_info(tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_logging_outside_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="before start"):
        LocalTracker(tmp_path).log(1, {})
