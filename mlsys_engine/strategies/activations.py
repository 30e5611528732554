"""Turns what was asked of the activations into an action for each block of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn

from mlsys_engine import activation as policies
from mlsys_engine.activation import ActivationPlan
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import (
    PRECISION_RULES,
    Loss,
    autocast,
    call_model,
    loss_sum_and_count,
    to_device,
)

Activation = str | float | ActivationPlan | None  # a policy, a budget, a plan, or nothing


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How a model runs when a budget is measured."""

    precision: str
    loss: Loss | None
    is_collective: bool  # every rank of the job measures now, and takes rank 0's plan


def is_budget(activation: Activation) -> TypeGuard[str | float]:
    """Whether the actions are known only when the model has been measured."""
    known = activation is None or isinstance(activation, ActivationPlan)
    return not known and activation not in policies.POLICIES


def check_activation(model: nn.Module, activation: Activation) -> dict[str, str]:
    """The action for each block of a policy or a plan; empty for a budget. Raises ConfigError for others."""
    if is_budget(activation):
        policies.check_budget(activation)
        return {}
    assert not isinstance(activation, float)
    return policies.resolve(model, activation)


def actions_for_budget(
    model: nn.Module, budget: str | float, sample: Any, measuring: Measuring
) -> dict[str, str]:
    """The action for each block that keeps the budget, measured on the sample as training runs it.

    Raises ConfigError for a budget without a sample, or with parameters that are yet to be converted.
    """
    if sample is None:
        raise ConfigError(
            f"activation={budget!r} was given without a sample.",
            "A budget is planned by running the model on a microbatch.",
            "Give sample=, or train a step before you ask for the optimizer or the state.",
        )
    if PRECISION_RULES[measuring.precision].parameters is not None:
        raise ConfigError(
            f"activation={budget!r} was given with precision={measuring.precision!r}.",
            "A budget is measured before the parameters are converted, and would be too large.",
            'Use the precision without "-pure", or activation="selective" or "full".',
        )
    call = partial(_call, measuring=measuring)
    plan = policies.plan(model, sample, budget, call=call, is_collective=measuring.is_collective)
    return dict(plan.actions)


def _call(model: nn.Module, sample: Any, *, measuring: Measuring) -> Any:
    """One microbatch as a runner runs it."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    sample, loss = to_device(sample, device), measuring.loss
    with autocast(measuring.precision, device):
        output = call_model(model, sample, with_loss=loss is not None)
        return output if loss is None else loss_sum_and_count(output, sample, loss)[0]
