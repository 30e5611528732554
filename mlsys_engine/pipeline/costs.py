"""What the stages of a pipeline cost: the numbers that the simulator and the search work on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
)

PerMicrobatch = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """One stage's seconds and bytes; a tuple instead of a number has one value for each microbatch."""

    forward_s: PerMicrobatch = 1.0
    input_s: PerMicrobatch = 1.0  # gradient of the stage's input
    weight_s: PerMicrobatch = 1.0  # gradient of the stage's weights
    backward_s: PerMicrobatch | None = None  # both at once; None: the sum of the two
    reduce_s: float = 0.0  # REDUCE_GRAD, which runs beside the computation
    activation_bytes: PerMicrobatch = 0  # held by a microbatch from its forward to its backward
    weight_bytes: PerMicrobatch = 0  # what is left of them between I and W
    output_bytes: PerMicrobatch = 0  # the message to the next stage, and of its gradient back

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else () if value is None else (value,):
                if not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
                    raise ConfigError(
                        f"A stage's cost {field.name}={value!r}.",
                        "Costs are finite numbers of seconds or bytes, 0 or more, or a tuple of them.",
                        "Measure the stage again.",
                    )


@dataclass(frozen=True, kw_only=True)
class PipelineCosts:
    """All stages and the links between the ranks.

    A message waits until the one before it on the same link, in the same direction, has left; that takes its
    bytes over `bytes_per_s`. It arrives `latency_s` later. `overlap` is the share of the shorter of
    the two actions of a pair (OVERLAP_F_B) that the longer one hides.
    """

    stages: tuple[StageCosts, ...]
    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not self.stages or not 0 <= self.latency_s < math.inf or not self.bytes_per_s > 0:
            raise ConfigError(
                f"Costs of {len(self.stages)} stages, latency_s={self.latency_s}, "
                f"bytes_per_s={self.bytes_per_s}.",
                "A pipeline has a stage at least, a finite latency, and links that carry something.",
                "Give StageCosts for every stage.",
            )
        if not 0 <= self.overlap <= 1:
            raise ConfigError(
                f"overlap={self.overlap} was given.",
                "It is the share of the shorter action that is hidden, from 0 to 1.",
                "Take 0 unless it was measured.",
            )

    @classmethod
    def even(cls, stages: int, **cost: float) -> PipelineCosts:
        """The same `StageCosts(**cost)` for every stage; by default one second for each of F, I and W."""
        return cls(stages=(StageCosts(**cost),) * stages)

    def seconds(self, action: Action) -> float:
        """How long a compute action, a pair or a REDUCE_GRAD takes."""
        if action.parts:
            times = [self.seconds(part) for part in action.parts]
            return sum(times) - self.overlap * min(times)
        stage = self.stages[action.stage]
        if action.microbatch is None:
            return stage.reduce_s
        return _SECONDS[action.kind](stage, action.microbatch)

    def message_s(self, num_bytes: float) -> float:
        """How long a message occupies its link."""
        return num_bytes / self.bytes_per_s


def of(value: PerMicrobatch, microbatch: int) -> float:
    """The cost of one microbatch; raises ConfigError when the tuple ends before it."""
    if not isinstance(value, tuple):
        return value
    if microbatch >= len(value):
        raise ConfigError(
            f"Costs of {len(value)} microbatches for a schedule with microbatch {microbatch}.",
            "A tuple has a cost for each microbatch.",
            "Give as many costs as the schedule has microbatches, or one number for all.",
        )
    return value[microbatch]


def _backward_s(stage: StageCosts, microbatch: int) -> float:
    if stage.backward_s is None:
        return of(stage.input_s, microbatch) + of(stage.weight_s, microbatch)
    return of(stage.backward_s, microbatch)


_SECONDS: dict[str, Callable[[StageCosts, int], float]] = {
    FORWARD: lambda stage, microbatch: of(stage.forward_s, microbatch),
    BACKWARD: _backward_s,
    BACKWARD_INPUT: lambda stage, microbatch: of(stage.input_s, microbatch),
    BACKWARD_WEIGHT: lambda stage, microbatch: of(stage.weight_s, microbatch),
}
