"""Up to which difference two runs are equal: fixed in float64, measured in anything narrower."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from mlsys_engine.plan import Plan
from mlsys_engine.verify.compare import Tolerance, output_gaps
from mlsys_engine.verify.planned import gradient_gaps
from mlsys_engine.verify.serial import SerialStep, StepInputs, run_serial
from mlsys_engine.verify.widen import cast_batch, wide_plan, widened

_FLOAT64 = 1e-10
_TIMES = 8.0  # the rounding of another order of sums, in those of the order of one process
_EPSILONS = 64.0  # at least, where one process happens to round to the same digits


def of_float64() -> Tolerance:
    """Sums of a million terms in another order stay far below, cancelled to a thousandth, too."""
    return Tolerance(
        value=_FLOAT64,
        reason="float64, where another order of a sum changes nothing beyond it",
        dtype="float64",
    )


def measured(plan: Plan, start: nn.Module, inputs: StepInputs, reference: SerialStep) -> Tolerance:
    """8 times the largest rounding error of the unsharded model itself, against its own step in float64."""
    with widened():
        shards = [[cast_batch(batch, torch.float64) for batch in shard] for shard in inputs.shards]
        wide = replace(inputs, shards=shards, loss_scale=1.0)
        truth = run_serial(wide_plan(plan, []), copy.deepcopy(start).to(torch.float64), wide, update=False)
    gaps = [
        *output_gaps(reference.outputs, truth.outputs).values(),
        *gradient_gaps(reference.gradients, truth.gradients).values(),
    ]
    rounding = max((gap.relative for gap in gaps), default=0.0)
    narrowest = max(
        (torch.finfo(value.dtype).eps for value in start.parameters() if value.is_floating_point()),
        default=torch.finfo(torch.float32).eps,
    )
    value, least = _TIMES * rounding, _EPSILONS * narrowest
    own = f"the unsharded model's own rounding is {rounding:.1e} against float64"
    reason = f"{own}; {_TIMES:g} times" if value > least else f"{own}; at least {_EPSILONS:g} epsilons"
    return Tolerance(value=max(value, least), reason=reason, dtype=plan.precision)
