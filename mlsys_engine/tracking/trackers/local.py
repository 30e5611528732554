"""The default tracker: everything about a run in one folder, readable without any program."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlsys_engine.errors import ConfigError
from mlsys_engine.tracking import json_files, runs
from mlsys_engine.tracking.base import RunInfo
from mlsys_engine.tracking.metrics_log import MetricsLog, read_metrics
from mlsys_engine.tracking.picture import loss_picture
from mlsys_engine.tracking.report import report_page

SCHEMA_VERSION = 1


class LocalTracker:
    """Writes run.json, manifest.json, metrics.jsonl, code.diff, loss.svg and report.html into the run folder.

    A resumed run goes on in the same files: metric lines past the resumed step are dropped, because those
    steps will be taken again, and the manifest of the earlier start is kept beside the new one.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.run_dir = Path(run_dir)
        self._fields: dict[str, Any] = {}
        self._log: MetricsLog | None = None

    def start(self, run: RunInfo) -> None:
        """Writes the record of a run that begins, or goes on from `run.resumed_from_step`."""
        earlier = self._earlier(run)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        step = run.resumed_from_step
        manifest = self._write_manifest(run.manifest, step if earlier else None)
        now = _now()
        segment = {"started": now, "from_step": step or 0, "world_size": run.world_size}
        self._fields = {
            "schema_version": SCHEMA_VERSION,
            "id": earlier.get("id", run.run_id),
            "status": "running",
            "created": earlier.get("created", now),
            "finished": None,
            "world_size": run.world_size,
            "backend": run.backend,
            "plan_hash": run.plan_hash,
            "steps": step or 0,
            "metrics": {},
            "baselines": run.baselines or earlier.get("baselines", {}),
            "segments": [*earlier.get("segments", []), segment],
            "process": runs.process_identity(),
            "manifest": manifest,
        }
        self._log = MetricsLog(self.run_dir / runs.METRICS_FILE, keep_to_step=step if earlier else None)
        self._fields["metrics"] = _latest(read_metrics(self.run_dir / runs.METRICS_FILE).rows)
        self._write_record()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line; an evaluation also refreshes run.json and the picture."""
        if self._log is None:
            raise RuntimeError("LocalTracker.log was called before start, or after finish.")
        self._log.append(step, metrics)
        self._fields["steps"] = max(int(self._fields["steps"]), int(step))
        self._fields["metrics"].update(metrics)
        if any(name.startswith("val_") for name in metrics):
            self._write_record()
            self._draw()

    def finish(self, status: str, summary: Mapping[str, float]) -> None:
        """Writes the final record, picture and page. A second call does nothing."""
        if self._log is None:
            return
        self._log.close()
        self._log = None
        self._fields["metrics"].update(summary)
        self._fields.update(status=status, finished=_now())
        self._write_record()
        rows = self._draw()
        json_files.write_text(self.run_dir / runs.REPORT_FILE, report_page(self._fields, rows))

    def _earlier(self, run: RunInfo) -> dict[str, Any]:
        """The record that is continued; empty when the run starts from nothing."""
        if not (self.run_dir / runs.RUN_FILE).exists():
            return {}
        record = runs.read_run(self.run_dir)
        if run.resumed_from_step is not None:
            return dict(record.fields)
        if record.status == "completed":
            raise ConfigError(
                f"{self.run_dir} already holds the completed run {record.id}; this one does not resume it.",
                "A new run needs a folder of its own, so that no record is lost.",
                "Name another run folder, or resume that run.",
            )
        return {}

    def _write_manifest(self, manifest: Mapping[str, Any], resumed_from: int | None) -> dict[str, Any]:
        """Writes manifest.json and code.diff (the diff's text lives in its own file, not in the JSON)."""
        if resumed_from is not None:
            for name in ("manifest.json", "code.diff"):
                file = self.run_dir / name
                if file.exists():
                    file.replace(file.with_stem(f"{file.stem}.before-step-{resumed_from}"))
        written = dict(manifest)
        code = dict(written.get("code") or {})
        diff = code.pop("diff", None)
        if diff:
            json_files.write_text(self.run_dir / "code.diff", diff)
            code["diff_file"] = "code.diff"
        if code:
            written["code"] = code
        json_files.write_json(self.run_dir / "manifest.json", written)
        return written

    def _write_record(self) -> None:
        json_files.write_json(self.run_dir / runs.RUN_FILE, self._fields)

    def _draw(self) -> tuple[Mapping[str, float], ...]:
        rows = read_metrics(self.run_dir / runs.METRICS_FILE).rows
        json_files.write_text(self.run_dir / runs.PICTURE_FILE, loss_picture(self._fields, rows))
        return rows


def _latest(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last value of every metric in rows that are in order of their steps."""
    latest: dict[str, float] = {}
    for row in rows:
        latest.update(row)
    return {name: value for name, value in latest.items() if name not in ("step", "time")}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
