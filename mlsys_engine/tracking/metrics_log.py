"""Metrics as JSON lines: a killed process loses none, and a torn one costs only itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlsys_engine.tracking import json_files

SYNC_EVERY_S = 1.0  # a power cut costs at most this much; a killed process costs no line


@dataclass(frozen=True, kw_only=True)
class MetricsTable:
    """The readable lines of a metrics file in step order, and what was wrong with the others."""

    rows: tuple[Mapping[str, float], ...]
    problems: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        """The last step with a line, 0 when there is none."""
        return int(max((row["step"] for row in self.rows), default=0))

    def series(self, name: str) -> list[tuple[float, float]]:
        """The (step, value) points of one metric."""
        return [(row["step"], row[name]) for row in self.rows if name in row]


class MetricsLog:
    """Appends one line a call, each by a single write. The caller closes it."""

    def __init__(self, path: Path, keep_to_step: int | None = None) -> None:
        """Opens the file; lines past `keep_to_step` and torn ones are dropped (None: all lines are)."""
        kept = [] if keep_to_step is None else _lines_to(path, keep_to_step)
        json_files.write_text(path, "".join(line + "\n" for line in kept))
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._synced = time.monotonic()

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line; it has reached the kernel when this returns."""
        line = json_files.dumps({"step": int(step), "time": round(time.time(), 3), **metrics})
        data = (line + "\n").encode()
        while data:
            data = data[os.write(self._descriptor, data) :]
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            self._sync()

    def close(self) -> None:
        """Flushes to the disk and closes; a second call does nothing."""
        if self._descriptor >= 0:
            self._sync()
            os.close(self._descriptor)
            self._descriptor = -1

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        self._synced = time.monotonic()


def read_metrics(path: Path) -> MetricsTable:
    """Reads a metrics file (missing: an empty table); torn or foreign lines are left out and named."""
    rows, problems = [], []
    for line_number, line in enumerate(_split(path), start=1):
        row = _parse(line)
        if row is None:
            problems.append(
                f"{path.name} line {line_number} is not a metrics line and was left out: {line[:60]!r}"
            )
        else:
            rows.append(row)
    return MetricsTable(rows=tuple(sorted(rows, key=lambda row: row["step"])), problems=tuple(problems))


def _lines_to(path: Path, step: int) -> list[str]:
    lines = _split(path)
    return [line for line in lines if (row := _parse(line)) is not None and row["step"] <= step]


def _split(path: Path) -> list[str]:
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")
    return [line for line in text.split("\n") if line.strip()]


def _parse(line: str) -> dict[str, float] | None:
    """A line's numbers, or None when it is no JSON object with a step."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    row = {key: found for key, item in value.items() if (found := json_files.number(item)) is not None}
    return row if "step" in row and row["step"] == row["step"] else None
