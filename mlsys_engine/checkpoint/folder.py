"""Where checkpoints lie: `<directory>/step-00000020/`, and nothing under that name that is not whole.

A checkpoint is written under a hidden temporary name and renamed when every byte is on disk, so a directory
with a final name was complete once. Anything wrong with it later is damage, and is reported instead of
skipped.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

DEFAULT_KEEP_LAST = 3  # older checkpoints of a directory are removed
_FINAL_NAME = re.compile(r"^step-(\d{8,})$")


def final_name(step: int) -> str:
    """The directory name of the checkpoint after optimizer step `step`."""
    return f"step-{step:08d}"


def temporary_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is complete; the same on every rank."""
    return directory / f".{final_name(step)}.partial"


def step_of(path: Path) -> int:
    """The step in a checkpoint's directory name, -1 when it is not the name of a checkpoint."""
    match = _FINAL_NAME.match(path.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; temporary ones are left out."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if path.is_dir() and step_of(path) >= 0), key=step_of)


def latest(directory: Path) -> Path | None:
    """The newest checkpoint under its final name, or None."""
    checkpoints = list_checkpoints(directory)
    return checkpoints[-1] if checkpoints else None


def clear_temporary(path: Path) -> None:
    """Removes what an interrupted save left under its temporary name."""
    if path.exists():
        shutil.rmtree(path)


def publish(temporary: Path, final: Path) -> None:
    """Gives a finished checkpoint its final name; a former one of that step is whole until then."""
    former = final.with_name(f".{final.name}.replaced")
    clear_temporary(former)
    if final.exists():
        final.rename(former)
    temporary.rename(final)
    sync_directory(final.parent)
    clear_temporary(former)


def prune(directory: Path, keep_last: int) -> list[Path]:
    """Removes all but the newest `keep_last` (at least one) checkpoints and returns what was removed."""
    surplus = list_checkpoints(directory)[: -max(keep_last, 1)]
    for path in surplus:
        # Renamed first: a deletion cut short must not leave half a checkpoint under a final name.
        doomed = path.with_name(f".{path.name}.partial")
        clear_temporary(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
    return surplus


def set_aside(directory: Path, after_step: int) -> list[Path]:
    """Renames checkpoints newer than `after_step` to `abandoned-step-...`, out of the way of `latest`.

    Called when training goes on from an older checkpoint: what came after it belongs to another history.
    """
    moved = []
    for path in list_checkpoints(directory):
        if step_of(path) > after_step:
            target = path.with_name(f"abandoned-{path.name}")
            if target.exists():
                shutil.rmtree(target)
            path.rename(target)
            moved.append(target)
    return moved


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
