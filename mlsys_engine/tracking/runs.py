"""Run folders: a name for a new one, and the way back to an old one."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.tracking.metrics_log import MetricsTable, read_metrics

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
PICTURE_FILE = "loss.svg"
REPORT_FILE = "report.html"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run as its folder tells it. `fields` is run.json; `status` also knows of a process that died."""

    path: Path
    fields: Mapping[str, Any]
    status: str
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return str(self.fields.get("id", self.path.name))

    @property
    def created(self) -> str:
        return str(self.fields.get("created", ""))

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.fields.get("metrics") or {}

    @property
    def baselines(self) -> Mapping[str, Any]:
        return self.fields.get("baselines") or {}

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.fields.get("manifest") or {}

    def read_metrics(self) -> MetricsTable:
        """Every logged line of the run."""
        return read_metrics(self.path / METRICS_FILE)

    def to_dict(self) -> dict[str, Any]:
        """run.json with the effective status, the folder and the warnings: what `--json` prints."""
        return {**self.fields, "id": self.id, "status": self.status, "path": str(self.path),
                "warnings": list(self.warnings)}  # fmt: skip


def new_run_id() -> str:
    """A name for a run: it sorts by time (UTC, to the millisecond) and ends in random digits."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%d-%H%M%S}-{now.microsecond // 1000:03d}-{secrets.token_hex(2)}"


def new_run_dir(base: str | os.PathLike[str] = "runs") -> tuple[str, Path]:
    """Creates an empty run folder below `base` and gives its id, which is its name, and its path."""
    while True:
        run_id = new_run_id()
        path = Path(base) / run_id
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(
                f"The run folder {path} cannot be created: {error.strerror}.",
                "Each run keeps its record in a folder of its own.",
                "Name another folder for the runs.",
            ) from None
        return run_id, path


def process_identity() -> dict[str, Any]:
    """Names this process beyond the reuse of its number: a record can tell whether its writer lives."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_created": psutil.Process().create_time(),
    }


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Reads one run folder. A half-written record is read as far as it goes, and says so in `warnings`."""
    folder = Path(path)
    file = folder / RUN_FILE
    if not file.is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no {RUN_FILE}.",
            "A run folder is what a training run leaves behind.",
            "List them with: mlsys runs list",
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
    except ValueError as error:
        warning = f"{file} cannot be read: {error}"
        return RunRecord(path=folder, fields={}, status="unreadable", warnings=(warning,))
    status = str(fields.get("status", "unknown"))
    if status == "running" and not _writer_lives(fields.get("process") or {}):
        warning = (
            "The process of this run ended without saying so; its record stops at the last line it wrote."
        )
        return RunRecord(path=folder, fields=fields, status="died", warnings=(warning,))
    return RunRecord(path=folder, fields=fields, status=status)


def list_runs(base: str | os.PathLike[str] = "runs") -> list[RunRecord]:
    """The runs below `base`, oldest first; a missing folder holds none."""
    folder = Path(base)
    if not folder.is_dir():
        return []
    records = [read_run(file.parent) for file in folder.glob(f"*/{RUN_FILE}")]
    return sorted(records, key=lambda record: (record.created, record.id))


def find_run(name: str, base: str | os.PathLike[str] = "runs") -> Path:
    """The folder of a run given as "latest", an id, the unambiguous beginning of an id, or a path."""
    folder = Path(name)
    if (folder / RUN_FILE).is_file():
        return folder
    records = list_runs(base)
    if not records:
        raise ConfigError(
            f"There is no run {name!r}: {Path(base)} holds no runs.",
            "A run is 'latest', an id from `mlsys runs list`, or the path of a run folder.",
            "Train one with `mlsys train`, or name another folder with --runs-dir.",
        )
    if name == "latest":
        return records[-1].path
    by_name = {known: record.path for record in records for known in (record.path.name, record.id)}
    if name in by_name:
        return by_name[name]
    matches = sorted({path for known, path in by_name.items() if name and known.startswith(name)})
    if len(matches) == 1:
        return matches[0]
    raise ConfigError(
        f"{len(matches)} runs begin with {name!r}."
        if matches
        else f"There is no run {name!r} in {Path(base)}.",
        "A run is 'latest', an id from `mlsys runs list`, or the path of a run folder.",
        "Write more of the id." if matches else did_you_mean(name, [*by_name, "latest"]),
    )


def _writer_lives(process: Mapping[str, Any]) -> bool:
    """False only when the writer was on this host and is gone; elsewhere it cannot be known."""
    if process.get("host") != socket.gethostname() or not isinstance(process.get("pid"), int):
        return True
    try:
        created = psutil.Process(process["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    return abs(created - float(process.get("process_created", created))) < 1.0
