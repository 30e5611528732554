"""What a strategy is: a small frozen value that turns a trace into a Plan, and a way to build that Plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from mlsys_engine.comm.launch import World
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import Loss, call_model
from mlsys_engine.optim import GradientNoiseScale, LossScaler
from mlsys_engine.plan import NUMERICS_MODES, PRECISIONS, Plan, Runner
from mlsys_engine.trace import EXECUTION, Trace, trace
from mlsys_engine.trace.execution import Call

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is asked for besides the strategy; checked when made, before any process starts."""

    precision: str = "fp32"
    """Arithmetic of forward and backward; with "-pure" the parameters are stored so, too."""
    accumulate: int = 1
    """Microbatches of one step on each rank."""
    activation: Mapping[str, str] = field(default_factory=dict)
    """Activation action for each block, by name."""
    numerics: str = "fast"
    """The promise about bits."""
    compile: bool = False
    """Whether the model is compiled with torch.compile."""
    seed: int | None = None
    """Seed of every rank's random numbers; None leaves them alone."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"precision={self.precision!r}.", f"It is one of {', '.join(PRECISIONS)}.", 'Use "fp32".'
            )
        if self.numerics not in NUMERICS_MODES:
            raise ConfigError(
                f"numerics={self.numerics!r}.", f"It is one of {', '.join(NUMERICS_MODES)}.", 'Use "fast".'
            )
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise ConfigError(
                f"accumulate={self.accumulate!r}.",
                "It is the number of microbatches of a step, at least 1.",
                "Use 1 to not accumulate.",
            )


@dataclass(frozen=True, eq=False)
class Subject:
    """What a plan is made for: a model, a batch that it is fed, and the loss of its training."""

    model: nn.Module
    sample: Any = None
    loss: Loss | None = None

    @property
    def trace(self) -> Trace:
        """What runs in which order; of the model's registration where there is no sample."""
        return self._traced[0]

    @property
    def call(self) -> Call:
        """How the sample goes into the model: all of it, or the first of a pair whose rest is the loss's."""
        return self._traced[1]

    @cached_property
    def _traced(self) -> tuple[Trace, Call]:
        # With a loss the sample goes in as a batch of training does. Where none is told, a tuple is tried as
        # all of the model's arguments, then as (input, what the loss needs). No strategy reads what only
        # gradients tell, and without them checkpointed blocks run plainly.
        whole, first = (partial(call_model, with_loss=with_loss) for with_loss in (False, True))
        if self.loss is not None:
            return trace(self.model, self.sample, call=first, gradients=False), first
        found = trace(self.model, self.sample, call=whole, gradients=False)
        if self.sample is not None and found.order_source != EXECUTION:
            again = trace(self.model, self.sample, call=first, gradients=False)
            if again.order_source == EXECUTION:
                return again, first
        return found, whole


class SampleNeededError(ConfigError):
    """A plan that can only be made when it is known what the model is fed; everything else was checked."""


class Strategy(Protocol):
    """One way to lay out training. A new one is one file and one line in `registry.STRATEGIES`."""

    name: ClassVar[str]

    def plan(self, subject: Subject, world_size: int, options: PlanOptions) -> Plan:
        """The layout of a model on `world_size` ranks. Needs none; raises ConfigError for what cannot be."""

    @staticmethod
    def build(
        plan: Plan,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory,
        loss: Loss | None,
        max_grad_norm: float | None,
        world: World,
        loss_scaler: LossScaler | None,
        noise_scale: GradientNoiseScale | None,
    ) -> Runner:
        """Builds a plan that `plan` made, on every rank of `world`, converting the model in place."""
