from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.tracking import find_run, list_runs, new_run_dir, read_run
from mlsys_engine.tracking.runs import process_identity


def _write(base: Path, name: str, **fields: Any) -> Path:
    folder = base / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": name, "status": "completed", **fields}))
    return folder


def test_new_folders_are_unique_and_their_names_sort_by_time(tmp_path: Path) -> None:
    created = [new_run_dir(tmp_path / "runs") for _ in range(20)]
    assert len({run_id for run_id, _ in created}) == 20
    assert all(path.is_dir() and path.name == run_id for run_id, path in created)
    stamps = [run_id.rsplit("-", 1)[0] for run_id, _ in created]
    assert stamps == sorted(stamps)


def test_a_file_in_place_of_the_runs_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match="cannot be created: Not a directory"):
        new_run_dir(tmp_path / "runs")


def test_latest_is_the_run_that_was_created_last(tmp_path: Path) -> None:
    _write(tmp_path, "b", created="2026-01-01T00:00:00.000001+00:00")
    newest = _write(tmp_path, "a", created="2026-01-01T00:00:00.000002+00:00")
    assert find_run("latest", tmp_path) == newest
    assert [record.id for record in list_runs(tmp_path)] == ["b", "a"]


def test_a_run_is_found_by_id_by_beginning_and_by_path(tmp_path: Path) -> None:
    first = _write(tmp_path, "20260101-000000-000-aaaa")
    _write(tmp_path, "20260102-000000-000-bbbb")
    assert find_run("20260101-000000-000-aaaa", tmp_path) == first
    assert find_run("20260101", tmp_path) == first
    assert find_run(str(first), tmp_path / "elsewhere") == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latets", "Did you mean 'latest'?"),
        ("2026", "2 runs begin with '2026'. .* Write more of the id."),
        ("", "There is no run ''"),
    ],
)
def test_a_name_that_fits_no_single_run_is_refused_with_a_way_out(
    tmp_path: Path, name: str, message: str
) -> None:
    _write(tmp_path, "20260101-000000-000-aaaa")
    _write(tmp_path, "20260102-000000-000-bbbb")
    with pytest.raises(ConfigError, match=message):
        find_run(name, tmp_path)


def test_a_folder_without_runs_says_how_to_make_one(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "missing") == []
    with pytest.raises(ConfigError, match="Train one with `mlsys train`"):
        find_run("latest", tmp_path)


def test_a_half_written_record_is_listed_as_unreadable_and_says_why(tmp_path: Path) -> None:
    folder = _write(tmp_path, "a")
    (folder / "run.json").write_text('{"id": "a", "sta')
    (record,) = list_runs(tmp_path)
    assert (record.status, record.id) == ("unreadable", "a")
    assert "cannot be read" in record.warnings[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no run\.json"):
        read_run(tmp_path)


def test_a_run_of_a_living_process_is_running(tmp_path: Path) -> None:
    folder = _write(tmp_path, "a", status="running", process=process_identity())
    assert read_run(folder).status == "running"


def _identify(connection: Any) -> None:
    connection.send(process_identity())


def test_a_run_whose_process_is_gone_is_shown_as_died(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_identify, args=(sender,))
    process.start()
    identity = receiver.recv()
    process.join()
    record = read_run(_write(tmp_path, "a", status="running", process=identity))
    assert record.status == "died" and record.warnings


def test_a_reused_process_number_does_not_make_a_dead_run_look_alive(tmp_path: Path) -> None:
    identity = process_identity()
    identity["process_created"] -= 3600.0
    assert read_run(_write(tmp_path, "a", status="running", process=identity)).status == "died"


def test_a_run_on_another_host_is_believed(tmp_path: Path) -> None:
    identity = process_identity() | {"host": "elsewhere", "pid": 1}
    assert read_run(_write(tmp_path, "a", status="running", process=identity)).status == "running"
