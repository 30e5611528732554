"""One step of the plan on this rank, and how far what this rank holds is from the unsharded step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mlsys_engine.data_parallel.update import ScaledStep
from mlsys_engine.plan import Plan, Runner, StepResult
from mlsys_engine.strategies import apply
from mlsys_engine.verify.gaps import Gap, floor, peak, tensor_gap
from mlsys_engine.verify.observe import Key, Numbers, OutputRecorder
from mlsys_engine.verify.serial import SerialStep, StepInputs, Tensors

_FIRST_ORDER = 4.0  # an update moves at most so many times as far, relatively, as its gradient


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank saw and found; small enough to be sent."""

    data_rank: int
    loss: float
    grad_norm: float
    count: float
    skipped: bool
    outputs: dict[Key, list[Numbers]]
    gradients: dict[str, Gap]
    parameters: dict[str, Gap]
    buffers: dict[str, Gap]
    absent: tuple[str, ...]
    """Parameters of this rank that have a gradient in one process and none here."""
    sees_gradients: bool
    """False where no rank keeps reduced gradients: under a sharded optimizer."""


def run_planned(
    plan: Plan, model: nn.Module, inputs: StepInputs, reference: SerialStep, tolerance: float
) -> RankReport:
    """Applies the plan to `model` (the caller's copy), steps once, compares. Every rank calls it alike."""
    recorder = OutputRecorder(model)
    runner = apply(
        plan, model, optimizer=inputs.optimizer, loss=inputs.loss, max_grad_norm=inputs.max_grad_norm
    )
    recorder.shard = runner.data_rank
    inputs.seed_shard(runner.data_rank)
    try:
        result = runner.step(list(inputs.shards[runner.data_rank]))
    finally:
        recorder.close()
    found = report(
        plan,
        runner=runner,
        result=result,
        recorder=recorder,
        reference=reference,
        tolerance=tolerance,
    )
    runner.close()  # not after a failure: a divided model is made whole by all ranks together
    return found


def report(
    plan: Plan,
    *,
    runner: Runner,
    result: StepResult,
    recorder: OutputRecorder,
    reference: SerialStep,
    tolerance: float,
) -> RankReport:
    """The report of a rank whose runner has just stepped. Every rank calls it: the state is gathered."""
    fused = isinstance(runner.optimizer, ScaledStep)  # .grad is then the sum, else the clipped mean
    true = reference.gradients if fused else reference.clipped
    sees_gradients = plan.shard == "none" or plan.axis("data") == 1
    gradients = _gradients(runner, result, fused) if sees_gradients else {}
    here = {name for name, value in runner.model.named_parameters() if not value.is_meta}
    state = runner.state_dict(full=True)["model"]
    own_parameters = {name: state[name] for name in reference.parameters}
    own_buffers = {name: state[name] for name in reference.buffers}
    return RankReport(
        data_rank=runner.data_rank,
        loss=float(result.loss),
        grad_norm=float(result.grad_norm),
        count=float(result.num_tokens),
        skipped=bool(result.skipped),
        outputs=recorder.outputs,
        gradients=gradient_gaps(gradients, true),
        parameters=_parameter_gaps(own_parameters, reference, tolerance),
        buffers=_buffer_gaps(own_buffers, reference.buffers),
        absent=tuple(name for name in true if sees_gradients and name in here and name not in gradients),
        sees_gradients=sees_gradients,
    )


def _gradients(runner: Runner, result: StepResult, fused: bool) -> Tensors:
    divisor = result.num_tokens * result.measured.get("loss_scale", torch.ones(())).to(torch.float64)
    return {
        name: runner.joined(name, value.grad).to(torch.float64) / (divisor if fused else 1.0)
        for name, value in runner.model.named_parameters()
        if value.grad is not None
    }


def gradient_gaps(own: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]) -> dict[str, Gap]:
    """By name; a gradient that the unsharded run has not is held against zero."""
    least = floor(true)
    return {
        name: tensor_gap(
            value,
            true.get(name, torch.zeros_like(value)),
            max(peak(true[name]) if name in true else 0.0, least),
        )
        for name, value in own.items()
    }


def _parameter_gaps(
    own: Mapping[str, torch.Tensor], reference: SerialStep, tolerance: float
) -> dict[str, Gap]:
    """Of the updates, so that a weight that is large beside its update hides nothing.

    An element may differ by the rounding of the stored weight, and by what a gradient within the tolerance
    moves an update: as much as the gradient itself relatively, since no rule grows faster than its gradient.
    """
    updates = {name: value - reference.before[name] for name, value in reference.parameters.items()}
    least, least_gradient = floor(updates), floor(reference.clipped)
    gaps = {}
    for name, update in updates.items():
        after, before = reference.parameters[name], reference.before[name]
        allowance = 2.0 * torch.finfo(after.dtype).eps * after.to(torch.float64).abs()
        if name in reference.clipped:
            gradient = reference.clipped[name].abs()
            noise = tolerance * max(peak(gradient), least_gradient)
            allowance += (
                _FIRST_ORDER * update.to(torch.float64).abs() * (noise / gradient).clamp(max=1.0).nan_to_num()
            )
        apart = own[name].to(before.device, torch.float64) - before.to(torch.float64)
        gaps[name] = tensor_gap(apart, update, max(peak(update), least), allowance)
    return gaps


def _buffer_gaps(own: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]) -> dict[str, Gap]:
    return {name: tensor_gap(own[name], value, max(peak(value), 1.0)) for name, value in true.items()}
