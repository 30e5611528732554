"""Learning-rate schedules: torch's own schedulers, or a plain function of the step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from mlsys_engine.checkpoint.plain_values import loads_safely
from mlsys_engine.errors import ConfigError

LrSchedule = Callable[[torch.optim.Optimizer], LRScheduler] | Callable[[int], float]


class Schedule:
    """The learning rate of a training: stepped after every optimizer step, saved and restored with it.

    A `ReduceLROnPlateau` is stepped after every evaluation instead, with the validation loss.
    """

    def __init__(self, lr_schedule: LrSchedule | None, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._scheduler = None if lr_schedule is None else _build(lr_schedule, optimizer)
        if self._scheduler is not None and not loads_safely(self.state_dict()):
            raise ConfigError(
                f"The state of the lr_schedule {type(self._scheduler).__name__} holds objects of a class.",
                "A checkpoint stores plain values and tensors only, so that loading runs no code.",
                "Give the scheduler functions, not callable objects, or a state_dict() of plain values.",
            )

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group, for the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        """Called once after every step, skipped ones included: the schedule follows the step count."""
        if self._scheduler is not None and not isinstance(self._scheduler, ReduceLROnPlateau):
            with warnings.catch_warnings():
                # torch looks for a call of optimizer.step(); a Runner may step through another entry point.
                warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)", category=UserWarning)
                self._scheduler.step()

    def after_evaluation(self, val_loss: float) -> None:
        """Called after every evaluation within a fit."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(val_loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; empty without a schedule."""
        return {} if self._scheduler is None else dict(self._scheduler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state. The optimizer's own learning rates are restored with the optimizer."""
        if bool(state) != (self._scheduler is not None):
            raise ConfigError(
                f"The checkpoint was saved {'with' if state else 'without'} an lr_schedule.",
                "A resumed training goes on with the schedule that it had.",
                "Pass the same lr_schedule, or start without resume=.",
            )
        if self._scheduler is not None:
            self._scheduler.load_state_dict(dict(state))


def _build(lr_schedule: Callable[[Any], Any], optimizer: torch.optim.Optimizer) -> LRScheduler:
    # The two accepted forms are told apart by trying the harmless one first: a function of the step returns a
    # number for step 0; a factory of schedulers cannot do anything with an integer.
    factor, first_error = None, None
    if not inspect.isclass(lr_schedule):
        try:
            factor = lr_schedule(0)
        except Exception as error:  # shown below if the other form fails, too
            first_error = error
    if isinstance(factor, Real):
        return LambdaLR(optimizer, lr_schedule)
    try:
        scheduler = lr_schedule(optimizer)
    except Exception as error:
        cause = f"With the optimizer it raised {error!r}" + (
            f", with step 0 {first_error!r}" if first_error else ""
        )
        raise _not_a_schedule(f"lr_schedule={lr_schedule!r} failed. {cause}.") from error
    if not isinstance(scheduler, LRScheduler):
        raise _not_a_schedule(f"lr_schedule={lr_schedule!r} returned {scheduler!r}.")
    return scheduler


def _not_a_schedule(given: str) -> ConfigError:
    return ConfigError(
        given,
        "It is either a function of the step that gives a factor of the learning rate, or a function of the "
        "optimizer that returns a torch.optim.lr_scheduler.LRScheduler.",
        "For example lr_schedule=lambda step: min(1.0, (step + 1) / 100), or "
        "functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1000).",
    )
