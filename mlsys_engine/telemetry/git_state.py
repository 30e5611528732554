"""Which code ran: the commit, and everything that differs from it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0
MAX_UNTRACKED_BYTES = 256 * 1024  # a larger untracked file is data rather than code: named, not kept
MAX_DIFF_BYTES = 8 * 1024 * 1024


def code_version(start: Path | None = None) -> dict[str, Any]:
    """The git state of the code that runs; called once when a run starts.

    Looks from `start`, or else from the working directory, the main script's folder and this package, and
    takes the first that lies in a git work tree. Returns `commit`, `branch`, `dirty`, `diff` (text that
    `git apply` takes, small untracked files included), `diff_sha256` and `root`. Where there is no git, the
    commit is None; `note` says what could not be found out, and why.
    """
    reason = "no folder of this program exists"
    for folder in [start] if start else _starting_points():
        if not folder.is_dir():
            continue
        try:
            root = _git(folder, "rev-parse", "--show-toplevel").strip()
        except _GitError as error:
            reason = str(error)
        else:
            return _describe(Path(root))
    return {"commit": None, "branch": None, "dirty": None, "diff": "", "diff_sha256": None, "note": reason}


class _GitError(Exception):
    """git is missing, refused, or took too long."""


def _starting_points() -> list[Path]:
    script = Path(sys.argv[0] or ".").resolve().parent
    return [Path.cwd(), script, Path(__file__).resolve().parent]


def _describe(root: Path) -> dict[str, Any]:
    described: dict[str, Any] = {
        "commit": None,
        "branch": None,
        "dirty": None,
        "root": str(root),
        "diff": "",
        "diff_sha256": None,
    }
    try:
        described["branch"] = _git(root, "branch", "--show-current").strip() or None
        described["dirty"] = bool(_git(root, "status", "--porcelain", "-z", "--untracked-files=all"))
        described["commit"] = _git(root, "rev-parse", "--verify", "HEAD").strip()
        if described["dirty"]:
            described.update(_changes(root))
    except _GitError as error:
        described["note"] = str(error)
    return described


def _changes(root: Path) -> dict[str, Any]:
    names = [
        name for name in _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0") if name
    ]
    small = [name for name in names if _is_small_file(root / name)]
    diff = _diff(root, small)
    changes: dict[str, Any] = {
        "diff": diff,
        "diff_sha256": hashlib.sha256(diff.encode("utf-8", "surrogateescape")).hexdigest(),
    }
    if left_out := sorted(set(names) - set(small)):
        changes["untracked_left_out"] = left_out[:100]
    if len(diff) > MAX_DIFF_BYTES:
        changes["diff"] = ""
        changes["note"] = f"the changes are {len(diff)} bytes long: only their hash is kept"
    return changes


def _diff(root: Path, untracked: Sequence[str]) -> str:
    """The difference to HEAD. Untracked files enter through a copy of the index; the user's own stays."""
    index = Path(_git(root, "rev-parse", "--git-path", "index").strip())
    with tempfile.TemporaryDirectory(prefix="mlsys-index-") as folder:
        copy = Path(folder) / "index"
        if (root / index).exists():
            shutil.copyfile(root / index, copy)
        environment = {"GIT_INDEX_FILE": str(copy)}
        for start in range(0, len(untracked), 500):  # an argument list has a length limit
            _git(
                root, "add", "--intent-to-add", "--", *untracked[start : start + 500], environment=environment
            )
        return _git(root, "diff", "--binary", "--no-ext-diff", "--no-color", "HEAD", environment=environment)


def _is_small_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_UNTRACKED_BYTES


def _git(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    command = ["git", "-C", str(folder), *arguments]
    variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            env=variables | (environment or {}),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise _GitError("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise _GitError(f"git {arguments[0]} in {folder} took longer than {TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        first_line = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise _GitError(first_line or f"git {arguments[0]} ended with status {done.returncode}")
    return done.stdout.decode("utf-8", "surrogateescape")
