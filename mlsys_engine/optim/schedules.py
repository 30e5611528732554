"""Learning-rate schedules as values: functions of the step that give the factor of the learning rate.

`Trainer(lr_schedule=...)` and `torch.optim.lr_scheduler.LambdaLR(optimizer, ...)` take them as they are. All
share one warm-up: step s of the first `warmup_steps` has the factor (s + 1) / (warmup_steps + 1), so step 0
already trains and the first step after the warm-up is the first of the full rate. Steps count from 0; where a
schedule ends, at `total_steps`, its last factor stays.

They have no state: a training that is resumed with another schedule follows the new one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mlsys_engine.errors import ConfigError, did_you_mean

# How a rate falls: from 1 at progress 0 to 0 at progress 1.
_SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
)
_SCALING_RULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"linear": lambda ratio: ratio, "sqrt": math.sqrt}
)


class WarmedUp:
    """What all schedules share. Fields lie in slots, so that `__dict__`, which LambdaLR saves, is empty."""

    warmup_steps: int

    def __call__(self, step: int) -> float:
        """The factor of step 0, 1, ..."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return self.after_warmup(step)

    @abstractmethod
    def after_warmup(self, step: int) -> float:
        """The factor of a step after the warm-up; 1 for the first."""

    def _check_warmup(self) -> None:
        _check_count(self, "warmup_steps", 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decaying(WarmedUp):
    """What the schedules share that fall to `final` of the full rate at `total_steps`."""

    total_steps: int
    """Steps of the whole schedule, the warm-up included."""
    warmup_steps: int = 0
    """Steps in which the rate rises from zero."""
    final: float = 0.0
    """The last factor."""

    def __post_init__(self) -> None:
        self._check_decay()

    def _check_decay(self) -> None:
        self._check_warmup()
        _check_count(self, "total_steps", 1)
        if self.warmup_steps > self.total_steps:
            raise _refused(
                self,
                f"warmup_steps={self.warmup_steps}, total_steps={self.total_steps}",
                "The warm-up is part of total_steps.",
                f"Set total_steps to {self.warmup_steps} or more, or warm up for fewer steps.",
            )
        if not 0.0 <= self.final <= 1.0:  # also false for nan
            raise _refused(
                self,
                f"final={self.final}",
                "It is the last factor, from 0 to 1.",
                "Pass for example final=0.1, for a tenth of the full rate.",
            )

    def _progress(self, step: int) -> float:
        """From 0 after the warm-up to 1 at `total_steps`, where it stays."""
        return min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))

    def _fallen(self, shape: str, progress: float) -> float:
        return self.final + (1.0 - self.final) * _SHAPES[shape](progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant(WarmedUp):
    """The full rate after the warm-up."""

    warmup_steps: int = 0
    """Steps in which the rate rises from zero."""

    def __post_init__(self) -> None:
        self._check_warmup()

    def after_warmup(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Decaying):
    """A line from the full rate down to `final` of it."""

    def after_warmup(self, step: int) -> float:
        return self._fallen("linear", self._progress(step))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine(Decaying):
    """Half a cosine from the full rate down to `final` of it (Loshchilov & Hutter 2017, without restarts)."""

    def after_warmup(self, step: int) -> float:
        return self._fallen("cosine", self._progress(step))


@dataclass(frozen=True, kw_only=True, slots=True)
class Polynomial(Decaying):
    """(1 - progress) ** power, from the full rate down to `final` of it; LARS and LAMB use powers 2 and 1."""

    power: float = 2.0
    """Above 1 the rate falls fastest at first, below 1 at last."""

    def __post_init__(self) -> None:
        self._check_decay()
        if not (math.isfinite(self.power) and self.power > 0):
            raise _refused(self, f"power={self.power}", "A power is a positive number.", "Pass power=2.0.")

    def after_warmup(self, step: int) -> float:
        remaining = 1.0 - self._progress(step)
        return self.final + (1.0 - self.final) * remaining**self.power


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupStableDecay(Decaying):
    """Warm-up, the full rate, and a decay over the last `decay_steps` (WSD, Hu et al. 2024, MiniCPM).

    One long stable phase serves trainings of several lengths: decay from any of its checkpoints.
    """

    decay_steps: int
    """Steps of the decay at the end; a tenth to a fifth of all is usual."""
    decay: str = "linear"
    """Shape of the decay: "linear", "cosine", or "sqrt" for 1 - sqrt(progress) (Hagele et al. 2024)."""

    def __post_init__(self) -> None:
        self._check_decay()
        _check_count(self, "decay_steps", 1)
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise _refused(
                self,
                f"warmup_steps={self.warmup_steps}, decay_steps={self.decay_steps}, "
                f"total_steps={self.total_steps}",
                "Warm-up and decay are parts of total_steps.",
                f"Set total_steps to {self.warmup_steps + self.decay_steps} or more, or shorten them.",
            )
        if self.decay not in _SHAPES:
            raise _refused(
                self,
                f"decay={self.decay!r}",
                f"decay is one of {', '.join(map(repr, _SHAPES))}.",
                did_you_mean(str(self.decay), _SHAPES),
            )

    def after_warmup(self, step: int) -> float:
        begun = step - (self.total_steps - self.decay_steps)
        return self._fallen(self.decay, min(1.0, max(0.0, begun / self.decay_steps)))


@dataclass(frozen=True, kw_only=True, slots=True)
class InverseSqrt(WarmedUp):
    """1 / sqrt(step) after the warm-up (Vaswani et al. 2017): it needs no end, and keeps falling.

    Factor sqrt(t / (t + steps since the warm-up)), where t is `timescale`, or the warm-up's length.
    """

    warmup_steps: int = 0
    """Steps in which the rate rises from zero."""
    timescale: int | None = None
    """Steps after which the rate has fallen to 1 / sqrt(2); None: as many as the warm-up has, at least 1."""

    def __post_init__(self) -> None:
        self._check_warmup()
        if self.timescale is not None:
            _check_count(self, "timescale", 1)

    def after_warmup(self, step: int) -> float:
        timescale = self.timescale or max(1, self.warmup_steps)
        return math.sqrt(timescale / (timescale + step - self.warmup_steps))


SCHEDULES: Mapping[str, type[WarmedUp]] = MappingProxyType(
    {
        "constant": Constant,
        "linear": Linear,
        "cosine": Cosine,
        "polynomial": Polynomial,
        "wsd": WarmupStableDecay,
        "inverse_sqrt": InverseSqrt,
    }
)


def scaled_lr(base_lr: float, *, batch_size: int, base_batch_size: int, rule: str = "linear") -> float:
    """The learning rate for another batch size than the one that `base_lr` was tuned at.

    rule="linear" multiplies by the ratio of the batch sizes: SGD, where a step of a k times larger batch
    stands for k steps (Goyal et al. 2017). rule="sqrt" multiplies by its square root: Adam and its kin, which
    divide by the gradient's scale (Malladi et al. 2022), and LAMB (You et al. 2020). Both need a warm-up, and
    hold up to the batch size that the gradient's noise allows: GradientNoiseScale measures it. Raises
    ConfigError for numbers that are not positive.
    """
    for name, value in (
        ("base_lr", base_lr),
        ("batch_size", batch_size),
        ("base_batch_size", base_batch_size),
    ):
        if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise ConfigError(
                f"scaled_lr({name}={value}).", f"{name} is a positive number.", f"Pass {name} as one."
            )
    if rule not in _SCALING_RULES:
        raise ConfigError(
            f"scaled_lr(rule={rule!r}).",
            f"rule is one of {', '.join(map(repr, _SCALING_RULES))}.",
            did_you_mean(str(rule), _SCALING_RULES),
        )
    return base_lr * _SCALING_RULES[rule](batch_size / base_batch_size)


def _check_count(schedule: WarmedUp, field: str, least: int) -> None:
    value = getattr(schedule, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _refused(
            schedule,
            f"{field}={value!r}",
            f"It is a whole number of steps, at least {least}.",
            f"Pass {field} as one.",
        )


def _refused(schedule: WarmedUp, given: str, expected: str, action: str) -> ConfigError:
    return ConfigError(f"schedules.{type(schedule).__name__}({given}).", expected, action)
