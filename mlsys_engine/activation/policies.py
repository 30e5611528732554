"""Activation checkpointing by policy: by name, or by a plan for a budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mlsys_engine.activation import blocks
from mlsys_engine.activation.budget import ActivationPlan, parse_budget, plan
from mlsys_engine.activation.checkpointing import apply_actions
from mlsys_engine.activation.forwards import ReplacedForward
from mlsys_engine.errors import ConfigError

BUDGET = "budget"


def checkpoint(
    model: nn.Module,
    policy: str = "full",
    *,
    budget: float | str | None = None,
    sample: Any = None,
    offload: bool = False,
    lossy: str | None = None,
) -> nn.Module:
    """Makes the model's blocks recompute their activations in the backward, and returns the same model.

    Called once, before training; calling it again changes nothing. Parameter names, outputs and gradients
    stay bit-equal, with dropout, autocast, keyword arguments and any output structure. "full" runs every
    block's forward twice a step. "budget" runs again what it takes to stay within `budget` (`plan` says in
    which forms, and what it measures): on `sample`, or, without one, on what the first training forward is
    given. Raises ConfigError for an unknown policy, and for `offload` and `lossy` packing, which this version
    does not have. Undo it with `uncheckpoint`.
    """
    if offload or lossy is not None:
        raise ConfigError(
            f"offload={offload!r}, lossy={lossy!r} was given to activation checkpointing.",
            "This version neither moves activations out of the device's memory nor packs them.",
            'Leave both out; policy="budget" keeps a smaller budget by running more again.',
        )
    if policy != BUDGET:
        if budget is not None or sample is not None:
            raise ConfigError(
                f"policy={policy!r} was given to activation checkpointing with a budget or a sample.",
                'They belong to policy="budget" and would have no effect.',
                'Write policy="budget", or leave them out.',
            )
        return apply_actions(model, blocks.resolve(model, policy))
    if budget is None:
        raise ConfigError(
            'policy="budget" was given to activation checkpointing without a budget.',
            "It is a part of what the plain model keeps, or a size.",
            'Give for example budget=0.5 or budget="6GiB".',
        )
    parse_budget(budget)
    if sample is not None:
        return plan(model, sample, budget).apply(model)
    if not isinstance(model.__dict__.get("forward"), PlanningForward):
        model.forward = PlanningForward(model, budget)
    return model


def resolve(model: nn.Module, activation: str | ActivationPlan | None) -> dict[str, str]:
    """The action for each block: of a policy by its name, or of a plan. Raises ConfigError for others."""
    if isinstance(activation, ActivationPlan):
        return dict(activation.actions)
    if activation == BUDGET:
        raise ConfigError(
            'activation="budget" was given without a budget.',
            "A budget is planned on a sample before training.",
            "Give activation=mls.activation.plan(model, sample, budget=0.5).",
        )
    return blocks.resolve(model, activation)


class PlanningForward(ReplacedForward):
    """The forward of a model that has a budget and no plan yet: the first training call makes it."""

    def __init__(self, model: nn.Module, budget: float | str) -> None:
        super().__init__(model, type(model).__name__)
        self._budget = budget

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        self.remove()
        plan(self._block, None, self._budget, call=lambda model, _: model(*args, **kwargs)).apply(self._block)
        return self._block.forward(*args, **kwargs)
