"""What every tracker implements. The trainer calls trackers on rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known when a run starts. `manifest` is nested and JSON-serialisable."""

    run_id: str
    run_dir: Path
    world_size: int
    backend: str
    plan_hash: str
    manifest: Mapping[str, Any]  # code, data, config, environment, threads, hardware
    baselines: Mapping[str, Any]  # e.g. {"bigram": {"bits_per_byte": 3.47}}; empty when none were fitted
    resumed_from_step: int | None = None


class Tracker(Protocol):
    """Receives one run's life: start, any number of logs, finish."""

    def start(self, run: RunInfo) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step or an evaluation (`loss`, `lr`, `grad_norm`, `tokens_per_s`, `val_loss`)."""

    def finish(self, status: str, summary: Mapping[str, float]) -> None:
        """`status` is "completed", "interrupted" or "failed"; `summary` holds the final metrics."""
