"""Chooses what each block of a model keeps, so that the activations fit a budget at the least slowdown."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from mlsys_engine.activation import picture, table
from mlsys_engine.activation.blocks import KEEP, resolve
from mlsys_engine.activation.chain import Chain, Schedule
from mlsys_engine.activation.checkpointing import apply_actions, uncheckpoint
from mlsys_engine.activation.forwards import ReplacedForward
from mlsys_engine.activation.measure import Call, peak_and_seconds
from mlsys_engine.activation.options import OFFLOAD, candidates
from mlsys_engine.activation.profile import Profile, profile
from mlsys_engine.activation.segments import actions_of, parse
from mlsys_engine.activation.solver import curve, memory_range
from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import encode
from mlsys_engine.trace import call_plainly

_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ATTEMPTS = 8
_BEATEN = 0.98  # of a time: less than that is no noise


@dataclass(frozen=True, kw_only=True)
class ActivationPlan:
    """What each block keeps, and what that takes. `apply` puts it into a model; printing it gives a table.

    Bytes are of activations saved for the backward, as `mls.memory.SavedActivationMeter` counts them.
    """

    actions: tuple[tuple[str, str], ...]  # block FQN -> action, of blocks that do not keep everything
    profile: Profile
    schedule: Schedule
    budget_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int  # with the actions applied, one forward and backward
    measured_seconds: float

    def apply(self, model: nn.Module) -> nn.Module:
        """Applies the actions to the model that was planned, or to one like it. Returns the same model."""
        return apply_actions(model, dict(self.actions))

    def __str__(self) -> str:
        return "\n".join(table.lines(self))

    def picture(self, width: int = 72) -> str:
        """For a terminal: what each block keeps, and the memory over the schedule's steps against the budget.

        At most `width` steps stand side by side; of a longer schedule neighbours share a column.
        """
        return "\n".join(picture.lines(self, width))

    def save_picture(self, path: str | os.PathLike[str]) -> None:
        """Writes an SVG: memory over the time of the schedule's steps, the plain model's and the budget."""
        Path(path).write_text(picture.svg(self), encoding="utf-8")

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON; `from_json` gives back an equal value."""
        return encode.to_json(self, indent)

    @classmethod
    def from_json(cls, text: str) -> ActivationPlan:
        """The plan that `to_json` wrote; raises ConfigError for a damaged text."""
        return encode.from_json(cls, text)


def plan(
    model: nn.Module,
    sample: Any,
    budget: float | str,
    *,
    call: Any = None,
    repeats: int = 3,
    offload: bool = False,
    lossy: str | None = None,
    is_collective: bool = True,
) -> ActivationPlan:
    """Measures the model on a sample and solves for the budget; called once, before training.

    `sample` is one microbatch: a mapping gives keyword arguments, a tuple or list positional ones. `budget`
    is a part of what the plain model keeps at its peak (0.5, "50%") or a size ("6GiB", or a whole number of
    bytes). `call(model, sample)` runs the model as training does, with autocast and loss, and returns its
    output or its loss; None calls the model plainly. `repeats` forwards and backwards time the result.

    A block keeps everything; computes cheap operations again ("selective"); or is run again. `offload=True`
    lets it move what it keeps out of the device's memory, too. `lossy` = "bf16", "int8" or "fp8" lets it
    pack it, which changes the gradients.

    The plan holds for samples of this shape; the model is unchanged afterwards. In a job every rank calls it
    alike, rank 0 measures, and its plan is everybody's; with is_collective=False a rank plans alone. Raises
    ConfigError with the least possible budget when the budget is too small, and for a model that is
    checkpointed already.
    Source: Herrmann et al. 2019, "Optimal checkpointing for heterogeneous chains".
    """
    budget_of, options = parse_budget(budget), candidates(lossy=lossy, offload=offload)
    _check_plain(model)
    run: Call = partial(call or call_plainly, model, sample)
    make = partial(_plan, model, run, options, budget_of, repeats)
    return on_rank_0(make) if is_collective else make()


def _plan(
    model: nn.Module, run: Call, options: Sequence[str], budget_of: Callable[[int], int], repeats: int
) -> ActivationPlan:
    measured = profile(model, _block_names(model), run, options)
    budget_bytes = budget_of(measured.plain_peak_bytes)
    room = budget_bytes - measured.fixed_bytes
    if budget_bytes >= measured.plain_peak_bytes:
        room = memory_range(measured.chain).enough_bytes
    trials = [_kept(model, run, measured, room, budget_bytes)]
    if repeats:
        trials += _of_one_option(model, run, measured, trials[0], budget_bytes)
    best, seconds = _fastest(model, run, trials, repeats)
    return ActivationPlan(
        actions=tuple(best.actions.items()),
        profile=measured,
        schedule=best.schedule,
        budget_bytes=budget_bytes,
        predicted_peak_bytes=best.schedule.peak_bytes + measured.fixed_bytes,
        measured_peak_bytes=best.peak_bytes,
        measured_seconds=seconds,
    )


@dataclass(frozen=True)
class _Trial:
    """A schedule that was applied and measured."""

    schedule: Schedule
    actions: dict[str, str]
    peak_bytes: int


def _kept(model: nn.Module, run: Call, measured: Profile, room: int, budget_bytes: int) -> _Trial:
    """The solver's schedule; solved again with less room while the model keeps more than its blocks told."""
    for _ in range(_ATTEMPTS):
        schedule = _solve(measured, room, budget_bytes)
        trial = _tried(model, run, measured, schedule)
        if trial.peak_bytes <= budget_bytes:
            return trial
        room = min(room - (trial.peak_bytes - budget_bytes), schedule.peak_bytes - 1)
        if room < memory_range(measured.chain).least_bytes:
            break
    raise _not_kept(model, budget_bytes, trial.peak_bytes)


def _of_one_option(
    model: nn.Module, run: Call, measured: Profile, chosen: _Trial, budget_bytes: int
) -> list[_Trial]:
    """What the solver gives when blocks have one option alone, where that keeps the budget and is different.

    The times of single blocks are noisy: these plainest schedules are compared as whole steps.
    """
    trials: list[_Trial] = []
    room = budget_bytes - measured.fixed_bytes
    for option in measured.chain.blocks[0].options:
        *blocks, rest = measured.chain.blocks
        alone = [replace(block, options=(block.option(option.name),)) for block in blocks]
        chain = Chain(blocks=(*alone, rest))
        if room < memory_range(chain).least_bytes:
            continue
        schedule = curve(chain, [room]).schedules[0]
        if any(_actions(schedule, measured) == other.actions for other in (chosen, *trials)):
            continue
        trial = _tried(model, run, measured, schedule)
        if trial.peak_bytes <= budget_bytes:
            trials.append(trial)
    return trials


def _tried(model: nn.Module, run: Call, measured: Profile, schedule: Schedule) -> _Trial:
    actions = _actions(schedule, measured)
    with _applied(model, actions):
        return _Trial(schedule, actions, peak_and_seconds(model, run, 0)[0])


def _fastest(model: nn.Module, run: Call, trials: Sequence[_Trial], repeats: int) -> tuple[_Trial, float]:
    """The trial that takes the least time, taking turns, and its seconds; the first unless others beat it."""
    taken: list[list[float]] = [[] for _ in trials]
    for _ in range(repeats):
        for trial, seconds in zip(trials, taken, strict=True):
            with _applied(model, trial.actions):
                seconds.append(peak_and_seconds(model, run, 1)[1])
    if not repeats:
        return trials[0], 0.0
    medians = [statistics.median(seconds) for seconds in taken]
    best = medians.index(min(medians))
    best = best if medians[best] < _BEATEN * medians[0] else 0
    return trials[best], medians[best]


@contextlib.contextmanager
def _applied(model: nn.Module, actions: dict[str, str]) -> Iterator[None]:
    try:
        apply_actions(model, actions)
        yield
    finally:
        uncheckpoint(model)


def parse_budget(budget: float | str) -> Callable[[int], int]:
    """From the plain model's peak to the budget's bytes. Raises ConfigError for neither part nor size."""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|B|KiB|MiB|GiB|)\s*", budget)
        if match and match[2] == "%" and 0 < float(match[1]) <= 100:
            return lambda peak: int(peak * float(match[1]) / 100)
        if match and not match[2] and 0 < float(match[1]) <= 1:
            return lambda peak: int(peak * float(match[1]))
        if match and match[2] in _UNITS and float(match[1]) >= 1:
            return lambda _: int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget > 1:
        return lambda _: budget
    elif isinstance(budget, float | int) and not isinstance(budget, bool) and 0 < budget <= 1:
        return lambda peak: int(peak * budget)
    raise ConfigError(
        f"budget={budget!r} was given to activation checkpointing.",
        "It is a part of what the plain model keeps, above 0 and up to 1, or a size in bytes.",
        'Give for example 0.5, "50%" or "6GiB".',
    )


def _not_kept(model: nn.Module, budget_bytes: int, peak: int) -> ConfigError:
    return ConfigError(
        f"A budget of {budget_bytes:,} bytes of activations for {type(model).__name__}.",
        f"The last of the schedules that should fit was measured at {peak:,} bytes.",
        f"Give at least {peak:,}.",
    )


def _solve(measured: Profile, room: int, budget_bytes: int) -> Schedule:
    least = memory_range(measured.chain).least_bytes
    if room < least:
        raise ConfigError(
            f"A budget of {budget_bytes:,} bytes of activations was given.",
            f"{measured.fixed_bytes:,} are kept outside of the {len(measured.names)} blocks, which need at "
            f"least {least:,}; the plain model keeps {measured.plain_peak_bytes:,}.",
            f"Give at least {measured.fixed_bytes + least:,}, or make the microbatch smaller.",
        )
    return curve(measured.chain, [room]).schedules[0]


def on_rank_0(make: Callable[[], ActivationPlan]) -> ActivationPlan:
    """What `make` gives on rank 0, on every rank of the job; what it raises there is raised on all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    told: list[dict[str, str] | None] = [None]
    if dist.get_rank() == 0:
        try:
            told = [{"plan": make().to_json()}]
        except ConfigError as error:
            told = [{"error": str(error)}]
    dist.broadcast_object_list(told, src=0)
    assert told[0] is not None
    if "error" in told[0]:
        raise ConfigError(
            "Rank 0 could not plan the activations of this job.",
            told[0]["error"],
            "Every rank takes rank 0's plan, so change what rank 0 was given.",
        )
    return ActivationPlan.from_json(told[0]["plan"])


def _check_plain(model: nn.Module) -> None:
    for name, block in model.named_modules():
        if isinstance(block.__dict__.get("forward"), ReplacedForward):
            raise ConfigError(
                f"A model whose block {name!r} is checkpointed already was given to be planned.",
                "A plan compares with the plain model.",
                "Call mls.activation.uncheckpoint(model) first.",
            )


def _actions(schedule: Schedule, measured: Profile) -> dict[str, str]:
    """Each block's action; one that keeps everything needs none, unless it must not fill a cache, or wait."""
    actions = actions_of(schedule, measured.names)
    recomputes = any(parse(action) for action in actions.values())
    offloads = any(action.endswith(OFFLOAD) for action in actions.values())
    if offloads or (measured.takes_cache and recomputes):
        return actions
    return {name: action for name, action in actions.items() if action != KEEP}


def _block_names(model: nn.Module) -> list[str]:
    return list(resolve(model, "full"))
