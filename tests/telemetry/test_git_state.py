from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from mlsys_engine.telemetry.git_state import MAX_UNTRACKED_BYTES, code_version


def _git(folder: Path, *arguments: str) -> str:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.com",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.com",
    }
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, env={**os.environ, **identity}, capture_output=True, check=True)
    return done.stdout.decode()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    _git(folder, "init", "-q", "-b", "work")
    (folder / "train.py").write_text("print(1)\n")
    (folder / ".gitignore").write_text("*.log\n")
    _git(folder, "add", ".")
    _git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_checkout_is_its_commit(repository: Path) -> None:
    code = code_version(repository)
    assert code["commit"] == _git(repository, "rev-parse", "HEAD").strip()
    assert (code["branch"], code["dirty"], code["diff"], code["diff_sha256"]) == ("work", False, "", None)


def test_the_diff_re_creates_the_dirty_tree_and_leaves_the_index_alone(
    repository: Path, tmp_path: Path
) -> None:
    (repository / "train.py").write_text("print(2)\n")
    (repository / "folder with space").mkdir()
    (repository / "folder with space" / "new.py").write_text("new = True\n")
    (repository / "image.bin").write_bytes(bytes(range(256)))
    (repository / "ignored.log").write_text("noise\n")
    status = _git(repository, "status", "--porcelain")

    code = code_version(repository)

    assert _git(repository, "status", "--porcelain") == status
    assert code["dirty"] is True and "ignored.log" not in code["diff"]
    assert code["diff_sha256"] == hashlib.sha256(code["diff"].encode("utf-8", "surrogateescape")).hexdigest()
    copy = tmp_path / "copy"
    _git(tmp_path, "clone", "-q", str(repository), str(copy))
    (tmp_path / "code.diff").write_bytes(code["diff"].encode("utf-8", "surrogateescape"))
    _git(copy, "apply", str(tmp_path / "code.diff"))
    for name in ("train.py", "folder with space/new.py", "image.bin"):
        assert (copy / name).read_bytes() == (repository / name).read_bytes()


def test_staged_changes_belong_to_the_diff(repository: Path) -> None:
    (repository / "train.py").write_text("print(3)\n")
    _git(repository, "add", "train.py")
    assert "+print(3)" in code_version(repository)["diff"]


def test_a_large_untracked_file_is_named_and_not_kept(repository: Path) -> None:
    (repository / "data.bin").write_bytes(b"x" * (MAX_UNTRACKED_BYTES + 1))
    code = code_version(repository)
    assert code["untracked_left_out"] == ["data.bin"]
    assert len(code["diff"]) < 1000


def test_a_subfolder_gives_the_whole_tree(repository: Path) -> None:
    (repository / "inner").mkdir()
    (repository / "train.py").write_text("print(4)\n")
    code = code_version(repository / "inner")
    assert code["root"] == str(repository) and "+print(4)" in code["diff"]


def test_a_repository_without_a_commit_says_so(tmp_path: Path) -> None:
    _git(tmp_path, "init", "-q")
    code = code_version(tmp_path)
    assert code["commit"] is None and code["note"]


def test_outside_git_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code = code_version(tmp_path)
    assert code["commit"] is None and code["dirty"] is None
    assert "not a git repository" in code["note"]


def test_without_git_installed_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(tmp_path)["note"] == "git is not installed"


def test_a_git_that_hangs_is_given_up(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec tail -f /dev/null\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("mlsys_engine.telemetry.git_state.TIMEOUT_S", 0.1)
    assert "took longer than 0.1 s" in code_version(repository)["note"]
