"""Learning-rate schedules are torch's to the last bit, in both forms, and across a resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from mlsys_engine.errors import ConfigError
from mlsys_engine.trainer.schedule import Schedule
from tests.trainer import workloads


def _two_phases(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    decay = lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    return lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[4])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "a class": lr_scheduler.ConstantLR,
    "a partial of a class": partial(lr_scheduler.CosineAnnealingLR, T_max=9),
    "a factory of several": _two_phases,
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20),
    "milestones": partial(lr_scheduler.MultiStepLR, milestones=[2, 5, 5], gamma=0.5),
    "a function of the step": lambda step: min(1.0, (step + 1) / 5),
}


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.3)


def _torch_lrs(kind: str, num_steps: int) -> list[float]:
    optimizer = _optimizer()
    build = SCHEDULES[kind]
    scheduler = (
        lr_scheduler.LambdaLR(optimizer, build) if kind == "a function of the step" else build(optimizer)
    )
    lrs = []
    for _ in range(num_steps):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return lrs


@pytest.mark.parametrize("kind", SCHEDULES)
def test_learning_rates_are_those_of_torch(kind: str) -> None:
    schedule = Schedule(SCHEDULES[kind], _optimizer())
    lrs = []
    for _ in range(12):
        lrs.append(schedule.lr)
        schedule.after_step()
    assert lrs == _torch_lrs(kind, 12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_learning_rates_go_on_exactly_after_a_resume(tmp_path: Path, kind: str) -> None:
    settings = {"lr_schedule": SCHEDULES[kind], "optimizer": partial(torch.optim.SGD, lr=0.3)}
    whole, first, second = workloads.Losses(), workloads.Losses(), workloads.Losses()
    loader = workloads.make_loader()
    workloads.make_trainer(tmp_path / "whole", whole, **settings).fit(loader, max_steps=11)
    workloads.make_trainer(tmp_path / "parts", first, **settings).fit(loader, max_steps=5, save_every=5)
    workloads.make_trainer(tmp_path / "parts", second, **settings).fit(loader, max_steps=11)
    assert whole.lrs == _torch_lrs(kind, 11)
    assert first.lrs + second.lrs == whole.lrs
    assert first.values + second.values == whole.values


def test_no_warning_about_the_order_of_steps_is_shown() -> None:
    optimizer = _optimizer()
    schedule = Schedule(lambda step: 1.0, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.after_step()


def test_plateau_follows_the_validation_loss_and_not_the_steps() -> None:
    schedule = Schedule(partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5), _optimizer())
    for val_loss in (1.0, 1.0):
        schedule.after_step()
        schedule.after_evaluation(val_loss)
    assert schedule.lr == 0.15


class _Factor:
    def __init__(self, other: object) -> None:
        self.other = other

    def __call__(self, step: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("lr_schedule", "message"),
    [
        (lambda x: "no", "returned 'no'"),
        (lambda: 1.0, "failed"),
        (partial(lr_scheduler.StepLR), "step_size"),
        (_Factor(other=_Factor(None)), "holds objects of a class"),
    ],
)
def test_what_is_no_schedule_is_refused_with_both_forms(lr_schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(lr_schedule, _optimizer())


def test_a_schedule_cannot_be_added_or_dropped_at_a_resume() -> None:
    schedule, none = Schedule(lambda step: 1.0, _optimizer()), Schedule(None, _optimizer())
    with pytest.raises(ConfigError, match="saved without an lr_schedule"):
        schedule.load_state_dict(none.state_dict())
    with pytest.raises(ConfigError, match="saved with an lr_schedule"):
        none.load_state_dict(schedule.state_dict())
