"""The training loop: steps, and what happens at the boundaries between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from mlsys_engine import checkpoint
from mlsys_engine.data import GlobalBatches
from mlsys_engine.errors import VerificationError
from mlsys_engine.plan import Plan, StepResult
from mlsys_engine.trainer.evaluating import evaluate
from mlsys_engine.trainer.events import Callbacks
from mlsys_engine.trainer.options import FitOptions
from mlsys_engine.trainer.record import CHECKPOINTS
from mlsys_engine.trainer.reporting import Reporter
from mlsys_engine.trainer.resuming import TrainingState
from mlsys_engine.trainer.stopping import (
    NO_STOP,
    Agreement,
    Control,
    SignalWatch,
    TrainingInterrupted,
    signal_of,
)
from mlsys_engine.verify import FirstStep


@dataclass(frozen=True)
class FitResult:
    """What `fit` returns: where the record is, the training's number of optimizer steps, its last metrics."""

    run_dir: Path
    steps: int
    metrics: dict[str, float]


class Loop:
    """One `fit`, from its first step to its last."""

    def __init__(
        self,
        *,
        state: TrainingState,
        plan: Plan,
        options: FitOptions,
        first_step: int,
        total_steps: int,
        saved_path: Path | None,
        run_dir: Path,
        eval_loader: DataLoader[Any] | None,
        is_bytes: bool,
        callbacks: Callbacks,
        reporter: Reporter,
        verifier: FirstStep | None = None,
    ) -> None:
        self._state, self._plan, self._options = state, plan, options
        self._step, self._total_steps, self._run_dir = first_step, total_steps, run_dir
        self._eval_loader, self._is_bytes = eval_loader, is_bytes
        self._callbacks, self._reporter = callbacks, reporter
        self._unproved = verifier
        self._control = Control()
        self._agreement = Agreement(self._control, state.world.world_size)
        self._evaluated_at = -1
        self._saved_path = saved_path  # the checkpoint of run_dir that the training goes on from, if it does
        self._saved_at = first_step if saved_path else -1

    def run(self) -> FitResult:
        """Trains, closes the record, and returns; raises TrainingInterrupted after a signal."""
        with SignalWatch(self._control):
            try:
                interrupted = signal_of(self._train()) is not None and self._step < self._total_steps
                status = "interrupted" if interrupted else "completed"
                self._fire("on_fit_end", status=status, metrics=self._reporter.summary())
            except BaseException:
                self._reporter.finish("failed")
                raise
            self._reporter.finish(status)
            # Once more, for two reasons: a signal may have come during the last save, and a launcher kills
            # the other ranks when one leaves, so none may leave before rank 0 has closed the record.
            number = signal_of(self._agreement.final())
        result = FitResult(self._run_dir, self._step, self._reporter.summary())
        if number is not None:
            raise TrainingInterrupted(number, self._step, self._saved_path, result)
        return result

    def _train(self) -> int:
        self._fire("on_fit_start", plan=self._plan)
        verdict = NO_STOP
        while verdict == NO_STOP and self._step < self._total_steps:
            verdict = self._train_epoch()
        verdict = max(verdict, self._agreement.final())
        self._reporter.flush()
        if signal_of(verdict) is None or self._step >= self._total_steps:
            if self._eval_loader is not None and self._evaluated_at != self._step:
                self._evaluate(scheduled=False)
            must_save = self._options.save_every is not None
        else:
            must_save = True
        if must_save and self._saved_at != self._step:
            self._save()
        return verdict

    def _train_epoch(self) -> int:
        batches = self._state.batches
        epoch, left = batches.epoch, batches_left(batches)
        self._fire("on_epoch_start", epoch=epoch)
        self._reporter.begin_step()
        for microbatches in batches:
            left -= 1
            self._take_step(epoch, microbatches)
            self._at_boundary(epoch)
            verdict = self._agreement.at_boundary()
            if left and (verdict != NO_STOP or self._step >= self._total_steps):
                return verdict
            if left == 0:
                break
            self._reporter.begin_step()
        batches.set_epoch(epoch + 1)
        self._fire("on_epoch_end", epoch=epoch)
        return verdict

    def _take_step(self, epoch: int, microbatches: list[Any]) -> None:
        state = self._state
        self._fire("on_step_start", epoch=epoch, batches=microbatches)
        lr = state.schedule.lr
        result = state.runner.step(microbatches) if self._unproved is None else self._prove(microbatches)
        self._step += 1
        state.schedule.after_step()
        self._reporter.end_step(self._step, epoch, lr, result)
        self._fire("on_step_end", epoch=epoch, result=result, lr=lr)

    def _prove(self, microbatches: list[Any]) -> StepResult:
        """A step that is compared with the unsharded model's; raises VerificationError where they differ."""
        assert self._unproved is not None
        result, verdict = self._unproved.step(self._state.runner, microbatches, self._state.world)
        if verdict is not None:
            self._reporter.message(verdict.line)
            self._unproved = None
            if not verdict.ok:
                raise VerificationError(verdict)
        return result

    def _at_boundary(self, epoch: int) -> None:
        every = self._options.eval_every
        if every is not None and self._step % every == 0:
            self._evaluate(scheduled=True)
        save_every = self._options.save_every
        if save_every is not None and self._step % save_every.steps == 0:
            self._save()

    def _evaluate(self, *, scheduled: bool) -> None:
        assert self._eval_loader is not None
        self._reporter.flush()
        metrics = evaluate(self._state.runner, self._eval_loader, is_bytes=self._is_bytes)
        self._evaluated_at = self._step
        if (
            scheduled
        ):  # the evaluation at the end is no part of the schedule: a longer training has none there
            self._state.schedule.after_evaluation(metrics["val_loss"])
        self._reporter.evaluation(self._step, metrics)
        self._fire("on_evaluation_end", epoch=self._state.batches.epoch, metrics=metrics)

    def _save(self) -> None:
        self._reporter.flush()
        save_every = self._options.save_every
        self._saved_path = checkpoint.save(
            self._run_dir / CHECKPOINTS,
            self._step,
            self._state.contents(),
            plan_hash=self._plan.hash,
            keep_last=save_every.keep_last if save_every else checkpoint.DEFAULT_KEEP_LAST,
        )
        self._saved_at = self._step
        self._reporter.message(f"step {self._step}  saved {self._saved_path}")
        self._fire("on_checkpoint_saved", path=self._saved_path)

    def _fire(self, event: str, **arguments: Any) -> None:
        self._callbacks.fire(
            event,
            step=self._step,
            run_dir=self._run_dir,
            runner=self._state.runner,
            control=self._control,
            **arguments,
        )


def batches_left(batches: GlobalBatches) -> int:
    """Optimizer steps from the present position to the end of the epoch."""
    layout = batches.layout
    full, rest = divmod(layout.num_samples - batches.sample, layout.global_batch_size)
    return full + (rest > 0 and not layout.drop_last)
