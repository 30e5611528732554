"""Reads step results one step late and hands them to trackers and the progress view."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlsys_engine.plan.runner import StepResult
from mlsys_engine.tracking import Tracker
from mlsys_engine.trainer.progress import ProgressView

_MAX_WARNINGS = 10
_SMOOTHING = 0.9  # of the displayed pace; the records hold each step's own


@dataclass(frozen=True)
class _Pending:
    step: int
    epoch: int
    lr: float
    elapsed_s: float
    result: StepResult


class Reporter:
    """Every rank has one; trackers and a visible progress exist on rank 0 only.

    Reading a StepResult waits for the device. Step k is therefore read when step k + 1 has been launched, so
    the device always has work; `flush` reads what is left, before evaluations, checkpoints and the end.
    """

    def __init__(self, trackers: Sequence[Tracker], view: ProgressView, total_steps: int) -> None:
        self._trackers, self._view, self._total_steps = trackers, view, total_steps
        self._pending: deque[_Pending] = deque()
        self._pace_s: float | None = None
        self._started = time.perf_counter()
        self._tokens, self._busy_s = 0, 0.0
        self.num_skipped, self._num_warnings = 0, 0
        self.latest: dict[str, float] = {}

    def begin_step(self) -> None:
        """Called before a step's batch is fetched: the step's time starts here."""
        self._started = time.perf_counter()

    def end_step(self, step: int, epoch: int, lr: float, result: StepResult) -> None:
        """Called right after a step; reads the one before it."""
        while self._pending:
            self._read(self._pending.popleft())
        elapsed = time.perf_counter() - self._started
        self._pending.append(_Pending(step, epoch, lr, elapsed, result))

    def flush(self) -> None:
        """Reads every step that has not been read."""
        while self._pending:
            self._read(self._pending.popleft())

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called with the metrics of one evaluation."""
        self.latest.update(metrics)
        for tracker in self._trackers:
            tracker.log(step, metrics)
        self._view.message(
            f"step {step}  " + "  ".join(f"{key} {value:.4f}" for key, value in metrics.items())
        )

    def message(self, text: str) -> None:
        """Shows a line on rank 0."""
        self._view.message(text)

    def summary(self) -> dict[str, float]:
        """The final metrics: the last step's and evaluation's, the mean pace and the skipped steps."""
        summary = {**self.latest, "num_skipped": float(self.num_skipped)}
        if self._busy_s:
            summary["tokens_per_s"] = self._tokens / self._busy_s
        return summary

    def finish(self, status: str) -> None:
        """Ends the record and the view."""
        self._view.close()
        for tracker in self._trackers:
            tracker.finish(status, self.summary())

    def _read(self, pending: _Pending) -> None:
        result = pending.result
        num_tokens = int(result.num_tokens)
        metrics: dict[str, float] = {
            "loss": float(result.loss),
            "lr": pending.lr,
            "grad_norm": float(result.grad_norm),
            "epoch": float(pending.epoch),
            "num_tokens": float(num_tokens),
            "tokens_per_s": num_tokens / max(pending.elapsed_s, 1e-9),
            "step_s": pending.elapsed_s,
            **{name: float(value) for name, value in result.measured.items()},
        }
        if bool(result.skipped):
            self.num_skipped += 1
            metrics["skipped"] = 1.0
        self.latest.pop("skipped", None)
        self._tokens += num_tokens
        self._busy_s += pending.elapsed_s
        self.latest.update(metrics)
        self._warn(pending.step, metrics)
        for tracker in self._trackers:
            tracker.log(pending.step, metrics)
        self._show(pending.step, metrics)

    def _warn(self, step: int, metrics: Mapping[str, float]) -> None:
        skipped = "skipped" in metrics
        if not skipped and math.isfinite(metrics["loss"]):
            return
        self._num_warnings += 1
        if self._num_warnings <= _MAX_WARNINGS:
            outcome = "the step was skipped on all ranks" if skipped else "the step was taken"
            self._view.message(
                f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}: {outcome}"
            )
        if self._num_warnings == _MAX_WARNINGS:
            self._view.message("Further such steps are in the record and not shown here.")

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        pace = metrics["step_s"]
        self._pace_s = pace if self._pace_s is None else _SMOOTHING * self._pace_s + (1 - _SMOOTHING) * pace
        eta_s = self._pace_s * (self._total_steps - step)
        self._view.show_step(step, metrics["loss"], metrics["num_tokens"] / max(self._pace_s, 1e-9), eta_s)
