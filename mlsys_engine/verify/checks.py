"""What cannot be compared is refused, where possible before a rank is started."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import Plan
from mlsys_engine.verify.compare import output_gaps
from mlsys_engine.verify.planned import gradient_gaps
from mlsys_engine.verify.serial import OptimizerFactory, SerialStep, StepInputs, run_serial

_MOST_RANKS = 64


def check_arguments(plan: Any, model: Any, *, precision: str, tolerance: float | None) -> None:
    """Raises ConfigError for arguments of the wrong kind, and for another model than the plan's."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"verify was given a {type(model).__name__} as the model.",
            "The model is a torch.nn.Module.",
            "Call verify(model, plan, batch).",
        )
    if not isinstance(plan, Plan):
        raise ConfigError(
            f"verify was given a {type(plan).__name__} as the plan.",
            "It proves a Plan, which says how many ranks there are.",
            "Make one first: mls.plan(model, strategy, sample, world=2).",
        )
    if precision not in ("float64", "model"):
        raise ConfigError(
            f"verify(precision={precision!r}).", 'It is "float64" or "model".', "Leave it out for float64."
        )
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError(
            f"verify(tolerance={tolerance!r}).",
            "It is the relative difference up to which values are equal: a finite number above 0.",
            "Leave it out for the one that is derived.",
        )
    _check_model(plan, model)


def _check_model(plan: Plan, model: nn.Module) -> None:
    planned = {slot.name: slot.shape for bucket in plan.buckets for slot in bucket.slots}
    own = {name: tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad}
    for name, value in model.named_parameters():
        if value.is_meta:
            raise ConfigError(
                f"{name} is on the meta device.",
                "verify runs the whole model in one process, with its weights.",
                "Materialise it first, or verify a smaller model of the same kind.",
            )
    if planned != own:
        name = min(key for key in planned.keys() | own.keys() if planned.get(key) != own.get(key))
        has = [
            f"{name} of shape {tuple(of[name])}" if name in of else f"no trainable {name}"
            for of in (planned, own)
        ]
        raise ConfigError(
            f"The plan has {has[0]} and the model has {has[1]}.",
            "verify compares a plan with the model that it was made from.",
            "Make the plan from this model with mls.plan.",
        )


def check_local_ranks(num_ranks: int) -> None:
    """Raises ConfigError for more ranks than one machine should start."""
    if num_ranks > _MOST_RANKS:
        raise ConfigError(
            f"verify would start {num_ranks} ranks on this machine.",
            f"It starts at most {_MOST_RANKS}.",
            "Verify the same strategy with a smaller world, or call verify in a job of the plan's ranks.",
        )


def check_optimizer(start: nn.Module, optimizer: OptimizerFactory, dtype: torch.dtype | None) -> None:
    """Raises ConfigError for an optimizer that does not take float64."""
    if dtype is not torch.float64:
        return
    trainable = [(name, value) for name, value in start.named_parameters() if value.requires_grad]
    try:
        optimizer(trainable)
    except ConfigError as error:
        raise ConfigError(
            f"In float64 the optimizer says: {error.given}",
            error.expected,
            'Leave optimizer out (plain SGD shows a difference as it is), or use precision="model".',
        ) from error


def check_finite(reference: SerialStep) -> None:
    """Raises ConfigError where the unsharded step has no numbers to compare with."""
    if not reference.count:
        raise ConfigError(
            "The loss of this batch counts nothing.",
            "verify compares the gradients of a mean over what is counted.",
            "Give a batch with at least one label that is not ignored.",
        )
    if not math.isfinite(reference.loss) or reference.skipped:
        what = "loss" if not math.isfinite(reference.loss) else "gradient norm"
        value = reference.loss if what == "loss" else reference.grad_norm
        raise ConfigError(
            f"The unsharded model's {what} on this batch is {value}.",
            "verify compares finite numbers.",
            "Give another batch, or weights with which the model works.",
        )


def check_repeatable(
    plan: Plan, start: nn.Module, inputs: StepInputs, reference: SerialStep, tolerance: float
) -> None:
    """Raises ConfigError where the unsharded model differs from itself, so that a verdict says nothing."""
    again = run_serial(plan, copy.deepcopy(start), inputs, update=False)
    gaps = {
        f"the output of {name or 'the model'}": gap.relative
        for name, gap in output_gaps(again.outputs, reference.outputs).items()
    } | {
        f"the gradient of {name}": gap.relative
        for name, gap in gradient_gaps(again.gradients, reference.gradients).items()
    }
    different = [(name, gap) for name, gap in gaps.items() if not gap <= tolerance]
    if different:
        name, gap = different[0]
        raise ConfigError(
            f"Two steps of the unsharded model differ: {name} by {gap:.2g}.",
            "verify compares runs that compute the same; torch's, numpy's and python's global generators are "
            "seeded alike.",
            "Verify a model whose forward is deterministic: no generators of its own and no kept state.",
        )
