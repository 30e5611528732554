from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlsys_engine.cli.main import main
from mlsys_engine.tracking import RunInfo
from mlsys_engine.tracking.trackers.local import LocalTracker

_STEPS = 60


def _train(base: Path, run_id: str) -> Path:
    folder = base / run_id
    tracker = LocalTracker(folder)
    tracker.start(
        RunInfo(
            run_id=run_id,
            run_dir=folder,
            world_size=2,
            backend="mlsys",
            plan_hash="00ff",
            manifest={
                "code": {"commit": "c0ffee", "dirty": True, "diff": "+x\n"},
                "data": {"fingerprint": "f" * 64, "description": "text", "unit": "byte"},
                "config": {"recipe": "gpt-bytes"},
                "hardware": {
                    "cpu": "CPU",
                    "logical_cores": 2,
                    "memory_bytes": 2**30,
                    "gpus": [{"name": "G"}],
                },
                "threads": {"num_threads": 1},
            },
            baselines={"bigram": {"bits_per_byte": 4.0}},
        )
    )
    for step in range(1, _STEPS + 1):
        tracker.log(step, {"loss": 3.0 / step})
    tracker.log(_STEPS, {"val_loss": 2.0, "val_bits_per_byte": 3.0})
    tracker.finish("completed", {})
    return folder


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for run_id in ("20260101-000000-000-aaaa", "20260102-000000-000-bbbb"):
        _train(tmp_path / "runs", run_id)
    return tmp_path / "runs"


def test_list_shows_every_run_on_a_line(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", *sorted(path.name for path in base.iterdir())]
    assert lines[1].split()[1:] == ["completed", "60", "2", "0.0500", "2.0000", "3.0000"]


def test_list_as_json_is_a_list_and_limit_keeps_the_newest(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "list", "--json", "--limit", "1"]) == 0
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["id"], run["commit"], run["status"]) == ("20260102-000000-000-bbbb", "c0ffee", "completed")
    assert "manifest" not in run


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list", "--runs-dir", str(tmp_path / "none")]) == 0
    assert "mlsys train" in capsys.readouterr().out
    assert main(["runs", "list", "--runs-dir", str(tmp_path / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_show_latest_as_json_has_what_programs_look_for(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", "show", "latest", "--json"]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["metrics"]["val_bits_per_byte"] == 3.0
    assert run["baselines"]["bigram"]["bits_per_byte"] == 4.0
    assert (run["world_size"], run["backend"]) == (2, "mlsys")
    assert run["manifest"]["code"]["commit"] == "c0ffee"
    assert run["manifest"]["data"]["fingerprint"] == "f" * 64
    assert Path(run["path"]).name == "20260102-000000-000-bbbb"


def test_show_compares_the_model_with_its_baselines(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "show", "20260101"]) == 0
    text = capsys.readouterr().out
    assert "20260101-000000-000-aaaa" in text and "c0ffee, with uncommitted changes (code.diff)" in text
    assert "-25.0 %" in text and "CPU, 2 cores, 1 GiB, G; 1 thread a rank" in text


def test_plot_draws_the_picture_again_and_a_line_in_the_terminal(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = base / "20260102-000000-000-bbbb" / "loss.svg"
    picture.unlink()
    assert main(["runs", "plot"]) == 0
    text = capsys.readouterr().out
    assert str(picture.relative_to(base.parent)) in text and "█" in text and "bits per byte" in text
    root = ElementTree.parse(picture).getroot()
    (raw, smoothed, validation) = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len((raw.get("points") or "").split()) == _STEPS
    assert len((smoothed.get("points") or "").split()) == _STEPS
    assert len((validation.get("points") or "").split()) == 1


def test_plot_to_another_file_leaves_the_run_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "other.svg"
    assert main(["runs", "plot", "--output", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] == str(target)
    ElementTree.parse(target)


def test_a_torn_metrics_file_is_plotted_as_far_as_it_goes_and_said(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = base / "20260102-000000-000-bbbb" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert main(["runs", "plot"]) == 0
    assert "Note: metrics.jsonl line 61 is not a metrics line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "shw"], "Did you mean 'show'?"),
        (["runs", "show", "20260103"], "There is no run '20260103'"),
        (["runs", "show", "2026"], "Write more of the id."),
        (["runs", "plot", "--output", "/nowhere/x.svg"], "Name another file with --output."),
        (["runs", "list", "--jsn"], "--json"),
        (["runs", "show", "--runs-dir", "elsewhere"], "Train one with `mlsys train`"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_status_2_and_no_traceback(
    base: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert "Traceback" not in captured.err


def test_help_names_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    assert main(["runs", "--help"]) == 0
    assert "mlsys runs plot [RUN]" in capsys.readouterr().out
    assert main(["runs", "list", "--help"]) == 0
    assert "--limit" in capsys.readouterr().out
