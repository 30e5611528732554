"""plan, apply and wrap: the way from a model to a Runner."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import activation as activation_policies
from mlsys_engine.comm.launch import World, current_world, init
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import Loss
from mlsys_engine.optim import GradientNoiseScale, LossScaler
from mlsys_engine.plan import Plan, Runner
from mlsys_engine.strategies.activations import (
    Activation,
    Measuring,
    actions_for_budget,
    check_activation,
    is_budget,
)
from mlsys_engine.strategies.base import OptimizerFactory, PlanOptions, SampleNeededError, Strategy, Subject
from mlsys_engine.strategies.data_parallel import DataParallel
from mlsys_engine.strategies.lazy import LazyRunner
from mlsys_engine.strategies.registry import from_name, strategy_type


def plan(
    model: nn.Module,
    strategy: Strategy | str,
    sample: Any = None,
    *,
    world: int | World | None = None,
    precision: str = "fp32",
    accumulate: int = 1,
    activation: Activation = None,
    numerics: str = "fast",
    compile: bool = False,
    seed: int | None = None,
    loss: Loss | None = None,
) -> Plan:
    """Resolves the whole layout of `model` on a world, as a value. Needs no ranks and changes nothing.

    `sample` is one microbatch; without it the order of the buckets is that of registration. `world` is a
    number of ranks or a World; the default is the current one, or one rank. `activation` is a policy
    ("full", "selective"), an ActivationPlan, or a budget (0.5, "50%", "6GiB"), which is measured on the
    sample, with `loss` if training has one; in a job every rank then calls this alike. Raises ConfigError
    for what cannot work.
    """
    measuring = Measuring(precision=precision, loss=loss, is_collective=True)
    return _plan(
        model,
        strategy,
        activation,
        measuring,
        sample,
        world=world,
        accumulate=accumulate,
        numerics=numerics,
        compile=compile,
        seed=seed,
    )


def _plan(
    model: nn.Module,
    strategy: Strategy | str,
    activation: Activation,
    measuring: Measuring,
    sample: Any = None,
    *,
    world: int | World | None,
    **options: Any,
) -> Plan:
    chosen = from_name(strategy)
    _check_model(model)
    options |= {"precision": measuring.precision, "activation": check_activation(model, activation)}
    checked = PlanOptions(**options)  # before anything runs
    if is_budget(activation):
        checked = replace(checked, activation=actions_for_budget(model, activation, sample, measuring))
    return chosen.plan(Subject(model, sample, measuring.loss), _world_size(world), checked)


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    optimizer: OptimizerFactory,
    loss: Loss | None = None,
    max_grad_norm: float | None = None,
    loss_scaler: LossScaler | None = None,
    noise_scale: GradientNoiseScale | None = None,
) -> Runner:
    """Builds a plan: converts `model` in place and returns what trains it. Every rank calls it alike.

    Joins the job first (mls.init) when nobody has. `optimizer` is called with the list of (name, parameter)
    of the trainable parameters and returns a torch.optim.Optimizer. `loss(output, batch)` returns a mean or
    `(sum, count)`; None takes the output's `.loss`. `loss_scaler` replaces the one that fp16 has, and
    `noise_scale` is told of every step's gradients. Afterwards `.to()` and `assign=True` are refused.
    """
    _check_model(model)
    check_loss(loss)
    world = init()
    if plan.world_size != world.world_size:
        raise ConfigError(
            f"A plan for {plan.world_size} ranks.",
            f"This job has {world.world_size}.",
            "Make the plan with world=mls.init(), or launch as many ranks as it has.",
        )
    _check_agreement(plan, world)
    activation_policies.apply_actions(model, dict(plan.activation))
    if plan.compile:
        model.compile()
    return strategy_type(plan.strategy).build(
        plan,
        model,
        optimizer=optimizer,
        loss=loss,
        max_grad_norm=max_grad_norm,
        world=world,
        loss_scaler=loss_scaler,
        noise_scale=noise_scale,
    )


def wrap(
    model: nn.Module,
    *,
    optimizer: OptimizerFactory,
    loss: Loss | None = None,
    strategy: Strategy | str = DataParallel(),  # noqa: B008 (a frozen value)
    max_grad_norm: float | None = None,
    loss_scaler: LossScaler | None = None,
    noise_scale: GradientNoiseScale | None = None,
    precision: str = "fp32",
    accumulate: int = 1,
    activation: Activation = None,
    numerics: str = "fast",
    compile: bool = False,
    sample: Any = None,
    seed: int | None = None,
) -> Runner:
    """plan and apply in one call, for those who keep their own loop. Called on every rank.

    Joins the job first (mls.init) when nobody has. With a sample everything is built at once. Without, at the
    first step, from its first microbatch on rank 0; or earlier and in registration order, when the optimizer
    or the state is asked for before.
    """
    chosen = from_name(strategy)
    _check_model(model)
    check_loss(loss)
    world = init()
    measuring = Measuring(precision=precision, loss=loss, is_collective=sample is not None)
    make_plan = partial(
        _plan,
        model,
        chosen,
        world=world,
        accumulate=accumulate,
        numerics=numerics,
        compile=compile,
        seed=seed,
    )
    build = partial(
        apply,
        model=model,
        optimizer=optimizer,
        loss=loss,
        max_grad_norm=max_grad_norm,
        loss_scaler=loss_scaler,
        noise_scale=noise_scale,
    )
    if sample is not None:
        return build(make_plan(activation, measuring, sample))
    # What cannot work is refused here, not at the first step.
    with suppress(SampleNeededError):
        make_plan(None if is_budget(activation) else activation, measuring)
    later = partial(make_plan, activation, measuring)  # on rank 0, which tells the others
    return LazyRunner(model=model, make_plan=later, build=build, world=world)


def check_loss(loss: object) -> None:
    """Refuses a loss that cannot be called; raises ConfigError."""
    if loss is not None and not callable(loss):
        raise ConfigError(
            f"loss={loss!r}.",
            "A loss is a function of (output, batch) that returns a mean or (sum, count), or None for the "
            "output's own .loss.",
            "Pass loss=fn, for example lambda output, batch: functional.cross_entropy(output, batch[1]).",
        )


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"A {type(model).__name__} was given as the model.",
            "The model is a torch.nn.Module.",
            "Pass the module itself.",
        )


def _world_size(world: int | World | None) -> int:
    if (
        isinstance(world, bool)
        or not isinstance(world, int | World | None)
        or (isinstance(world, int) and world < 1)
    ):
        raise ConfigError(
            f"world={world!r}.",
            "A world is a number of ranks, at least one, or what mls.init() returned.",
            "Give the number of ranks, or leave it out for the current world.",
        )
    if isinstance(world, int):
        return world
    known = world or current_world()
    return known.world_size if known is not None else 1


def _check_agreement(plan: Plan, world: World) -> None:
    """Ranks with different plans would wait for each other for ever: compare hashes before building."""
    if world.world_size == 1:
        return
    own = torch.tensor([int(plan.hash[:15], 16)], dtype=torch.int64)
    hashes = [torch.zeros_like(own) for _ in range(world.world_size)]
    dist.all_gather(hashes, own)
    different = [rank for rank, value in enumerate(hashes) if value.item() != hashes[0].item()]
    if different:
        raise ConfigError(
            f"Rank {different[0]} has another plan than rank 0; this is rank {world.rank} with {plan.hash}.",
            "Every rank applies an equal plan.",
            "Give every rank the same model, strategy, options and shape of sample.",
        )
