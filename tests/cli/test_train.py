from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mlsys_engine.cli import train
from mlsys_engine.cli.main import main
from mlsys_engine.tracking import read_run

_ROOT = Path(__file__).resolve().parents[2]
_SMALL = ["--model.width", "16", "--model.num-layers", "1", "--model.num-heads", "2", "--batch-size", "8"]
_SMALL += ["--model.context-length", "32", "--corpus-bytes", "200000", "--eval-samples", "16"]
_TIMEOUT_S = 240.0


def _mlsys(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlsys_engine.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(_ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


@pytest.fixture
def no_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise AssertionError(f"a rank was started: {arguments}")

    monkeypatch.setattr(train, "launch_local", refuse)
    monkeypatch.setattr(train, "init", refuse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt-byte"], "Did you mean 'gpt-bytes'?"),
        (["--strategy", "data_paralel"], "Did you mean 'data_parallel'?"),
        (["--strategy", "auto"], "This version builds"),
        (["--activation", "ful"], "Did you mean 'full'?"),
        (["--trackers", "locla"], "Did you mean 'local'?"),
        (["gpt-file", "--tokens", "nowhere.tokens"], "The token file nowhere.tokens does not exist."),
        (["gpt-file"], "--tokens"),
        (["--batch-size", "1", "--ranks", "2"], "--batch-size 1 with 2 ranks."),
        (["--ranks", "0"], "A job has at least 1 rank."),
        (["--steps", "0"], "--steps 0."),
        (["--stepz", "5"], "--steps"),
        (["--model.width", "63"], "Set width to a multiple of"),
        (["--precision", "fp8"], "fp8"),
        (["--resume", "latest"], "Train one with `mlsys train`"),
    ],
)
@pytest.mark.usefixtures("no_rank_starts")
def test_a_mistake_is_told_before_any_rank_starts_with_status_2_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split()) and captured.out == ""
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_rank_starts")
def test_ranks_that_contradict_the_launcher_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for key, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    assert main(["train", "--ranks", "3"]) == 2
    assert "--ranks 3, but the launcher started 2." in capsys.readouterr().err


@pytest.mark.usefixtures("no_rank_starts")
def test_a_dry_run_prints_the_plan_of_as_many_ranks_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--ranks", "3", *_SMALL]) == 0
    shown = capsys.readouterr().out
    assert "data 3 = 3 ranks" in shown and "global batch 8 sequences" in shown
    assert main(["train", "--dry-run", "--ranks", "3", *_SMALL, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["strategy"] == "data_parallel" and plan["schema_version"] >= 1
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_real_process_has_status_2_and_no_traceback(tmp_path: Path) -> None:
    done = _mlsys("train", "gpt-byte", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "mlsys: There is no recipe named 'gpt-byte'.",
        "       Recipes are gpt-bytes, gpt-file.",
        "       Did you mean 'gpt-bytes'?",
    ]


def test_training_on_two_ranks_leaves_the_record_that_was_promised(tmp_path: Path) -> None:
    done = _mlsys("train", "--ranks", "2", "--steps", "4", *_SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("2 on backend mlsys", "bigram", "this model", "run record", "picture"):
        assert words in done.stdout

    shown = _mlsys("runs", "show", "latest", "--json", folder=tmp_path)
    run = json.loads(shown.stdout)
    assert (run["world_size"], run["backend"], run["steps"], run["status"]) == (2, "mlsys", 4, "completed")
    assert run["metrics"]["val_bits_per_byte"] > 0
    assert run["baselines"]["bigram"]["bits_per_byte"] > 0
    assert "commit" in run["manifest"]["code"] and len(run["manifest"]["data"]["fingerprint"]) == 64
    assert run["manifest"]["config"]["recipe"] == "gpt-bytes"
    folder = Path(tmp_path / run["path"])
    ElementTree.parse(folder / "loss.svg")
    assert [row["step"] for row in read_run(folder).read_metrics().rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_is_resumed_by_its_record_and_its_json_stands_alone_on_stdout(tmp_path: Path) -> None:
    done = _mlsys("train", "--ranks", "2", "--steps", "4", *_SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    again = _mlsys("train", "--resume", "latest", "--steps", "6", "--json", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    resumed = json.loads(again.stdout)
    assert (resumed["id"], resumed["steps"], resumed["world_size"]) == (folder.name, 6, 2)
    assert resumed["manifest"]["config"]["settings"]["model"]["width"] == 16
    steps = [row["step"] for row in read_run(folder).read_metrics().rows if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_training_with_a_checkpoint_and_the_command_to_go_on(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mlsys_engine.cli", "train", "--ranks", "2", "--steps", "100000", *_SMALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if re.match(r"step \d+/", line):
            break
    process.send_signal(number)
    shown, errors = process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == status, errors
    assert f"Training stopped by {number.name} after step" in shown
    assert "Traceback" not in errors and "failed" not in errors
    (command,) = re.findall(r"Go on with: mlsys (train --resume \S+)", shown)
    (folder,) = (tmp_path / "runs").iterdir()
    record = read_run(folder)
    assert record.status == "interrupted"
    more = str(int(record.fields["steps"]) + 2)
    again = _mlsys(*command.split(), "--steps", more, folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert read_run(folder).fields["steps"] == int(more)


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_told_once_with_status_2(tmp_path: Path) -> None:
    done = _mlsys("train", "--ranks", "2", "--steps", "2", *_SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    largest = max((folder / "checkpoints").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    again = _mlsys("train", "--resume", "latest", "--steps", "4", folder=tmp_path)
    assert again.returncode == 2, again.stderr
    assert "Traceback" not in again.stderr and again.stderr.count(largest.name) == 1


@pytest.mark.slow
def test_a_bug_in_a_rank_shows_its_traceback_once_and_ends_all_ranks(tmp_path: Path) -> None:
    """The bug is planted in the ranks alone: their interpreters import this module at the start."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import mlsys_engine.recipes.gpt_bytes as recipe\n"
        "    def broken(*arguments, **keywords):\n"
        "        raise ZeroDivisionError('planted')\n"
        "    recipe.stdlib_corpus = broken\n"
    )
    path = f"{tmp_path}{os.pathsep}{_ROOT}"
    done = _mlsys("train", "--ranks", "2", "--steps", "2", *_SMALL, folder=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("ZeroDivisionError: planted") == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
