"""Names, order and renaming of checkpoints in a run's folder."""

from __future__ import annotations

from pathlib import Path

from mlsys_engine.checkpoint import folder


def _make(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).mkdir(parents=True)


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path: Path) -> None:
    _make(
        tmp_path,
        "step-00000010",
        "step-00000009",
        "step-123456789",
        ".step-00000011.partial",
        "step-1",
        "other",
    )
    (tmp_path / "step-00000012").write_text("a file")
    names = [path.name for path in folder.list_checkpoints(tmp_path)]
    assert names == ["step-00000009", "step-00000010", "step-123456789"]


def test_a_missing_folder_holds_none(tmp_path: Path) -> None:
    assert folder.list_checkpoints(tmp_path / "none") == []
    assert folder.latest(tmp_path / "none") is None


def test_pruning_never_removes_the_last_one(tmp_path: Path) -> None:
    _make(tmp_path, "step-00000010")
    assert folder.prune(tmp_path, 0) == []
    assert folder.latest(tmp_path) is not None


def test_pruning_leaves_temporary_ones_of_a_save_in_progress(tmp_path: Path) -> None:
    _make(tmp_path, "step-00000001", "step-00000002", ".step-00000003.partial")
    folder.prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".step-00000003.partial", "step-00000002"]


def test_newer_ones_are_set_aside_and_no_longer_the_latest(tmp_path: Path) -> None:
    _make(tmp_path, "step-00000010", "step-00000020", "step-00000030", "abandoned-step-00000030")
    moved = folder.set_aside(tmp_path, 10)
    assert [path.name for path in moved] == ["abandoned-step-00000020", "abandoned-step-00000030"]
    assert folder.latest(tmp_path) == tmp_path / "step-00000010"
