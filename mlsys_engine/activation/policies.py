"""Activation checkpointing by policy: by name, or by a plan for a budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from mlsys_engine.activation import blocks
from mlsys_engine.activation.blocks import SELECTIVE
from mlsys_engine.activation.budget import ActivationPlan, parse_budget, plan
from mlsys_engine.activation.checkpointing import apply_actions
from mlsys_engine.activation.forwards import ReplacedForward
from mlsys_engine.activation.options import candidates
from mlsys_engine.errors import ConfigError, did_you_mean

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
    stay bit-equal (not with `lossy`), with dropout, autocast, keyword arguments and any output. "full" runs
    every block twice a step. "budget" runs again what it takes to stay within `budget` (`plan` says in
    which forms, and what it measures): on `sample`, or, without one, on what the first training forward is
    given. `offload=True` moves what blocks keep under "selective" out of the device's memory (on the CPU to a
    file), `lossy` = "bf16", "int8" or "fp8" packs it, which changes the gradients a little; a budget chooses
    for each block. Raises ConfigError for what is unknown or has no effect. Undo it with `uncheckpoint`.
    """
    if policy != BUDGET:
        if budget is not None or sample is not None:
            raise ConfigError(
                f"policy={policy!r} was given to activation checkpointing with a budget or a sample.",
                'They belong to policy="budget" and would have no effect.',
                'Write policy="budget", or leave them out.',
            )
        return apply_actions(model, _actions(model, policy, offload, lossy))
    if budget is None:
        raise ConfigError(
            'policy="budget" was given to activation checkpointing without a budget.',
            "It is a part of what the plain model keeps, or a size.",
            'Give for example budget=0.5 or budget="6GiB".',
        )
    parse_budget(budget)
    candidates(offload=offload, lossy=lossy)
    make_plan = partial(plan, budget=budget, offload=offload, lossy=lossy)
    if sample is not None:
        return make_plan(model, sample).apply(model)
    if not isinstance(model.__dict__.get("forward"), PlanningForward):
        model.forward = PlanningForward(model, make_plan)
    return model


def _actions(model: nn.Module, policy: str, offload: bool, lossy: str | None) -> dict[str, str]:
    """A policy's actions. What blocks keep under "selective" is packed or offloaded, if that is asked for."""
    actions = blocks.resolve(model, policy)
    forms = candidates(offload=offload, lossy=lossy)
    if not offload and lossy is None:
        return actions
    if policy != SELECTIVE:
        raise ConfigError(
            f"policy={policy!r} was given with offload={offload!r}, lossy={lossy!r}.",
            "A block that is run again keeps nothing that could be moved or packed.",
            'Write policy="selective" or policy="budget", or leave them out.',
        )
    if offload and lossy is not None:
        raise ConfigError(
            f'policy="selective" was given with offload={offload!r} and lossy={lossy!r}.',
            "Each block either packs what it keeps or moves it away.",
            'Leave one of them out, or let policy="budget" choose for each block.',
        )
    return dict.fromkeys(actions, forms[-1])


def resolve(model: nn.Module, activation: str | ActivationPlan | None) -> dict[str, str]:
    """The action for each block: of a policy by its name, or of a plan. Raises ConfigError for others."""
    if isinstance(activation, ActivationPlan):
        return dict(activation.actions)
    if activation == BUDGET:
        raise ConfigError(
            'activation="budget" was given without a budget.',
            "A budget is planned on a sample before training.",
            'Give the budget itself, such as 0.5 or "6GiB".',
        )
    return blocks.resolve(model, activation)


def check_budget(budget: float | str) -> None:
    """Raises ConfigError for what is no policy, no part and no size."""
    if isinstance(budget, str) and not budget.strip()[:1].isdigit():
        raise ConfigError(
            f"activation={budget!r} was given.",
            f'It is a policy ({", ".join(blocks.POLICIES)}) or a budget, such as 0.5, "50%" or "6GiB".',
            did_you_mean(budget, blocks.POLICIES),
        )
    parse_budget(budget)


class PlanningForward(ReplacedForward):
    """The forward of a model that has a budget and no plan yet: the first training call makes it."""

    def __init__(self, model: nn.Module, make_plan: Callable[..., ActivationPlan]) -> None:
        super().__init__(model, type(model).__name__)
        self._make_plan = make_plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        self.remove()
        self._make_plan(self._block, None, call=lambda model, _: model(*args, **kwargs)).apply(self._block)
        return self._block.forward(*args, **kwargs)
