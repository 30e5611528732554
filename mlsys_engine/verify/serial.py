"""The step of the unsharded model: one process, shard after shard, microbatch after microbatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mlsys_engine.data_parallel import pure
from mlsys_engine.data_parallel.state import load_optimizer_state
from mlsys_engine.numerics import (
    PRECISION_RULES,
    GradientScale,
    Loss,
    autocast,
    call_model,
    gradient_scale,
    loss_sum_and_count,
    numerics_mode,
    shifts_labels,
    to_device,
)
from mlsys_engine.plan import Plan
from mlsys_engine.verify.observe import Key, Numbers, OutputRecorder
from mlsys_engine.verify.randomness import SeedShard, microbatches

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """Everything besides the model that a step depends on."""

    shards: Sequence[Sequence[Any]]
    """For each data shard, the list that its ranks give to Runner.step."""
    seed_shard: SeedShard
    loss: Loss | None
    optimizer: OptimizerFactory
    max_grad_norm: float | None
    optimizer_state: Mapping[str, Any] | None = None
    """As Runner.state_dict has it; None for a training's first step."""
    loss_scale: float = 1.0
    """Of fp16."""
    step: int = 0
    """Steps before this one."""


@dataclass(frozen=True, kw_only=True)
class SerialStep:
    """What one step of the unsharded model came to. Gradients are of the mean, before and after clipping."""

    loss: float
    count: float
    grad_norm: float
    skipped: bool
    order: tuple[str, ...]  # modules in order of execution
    trainable: tuple[str, ...]
    outputs: dict[Key, list[Numbers]]
    gradients: Tensors
    clipped: Tensors
    before: Tensors = field(default_factory=dict)  # parameters, by name
    parameters: Tensors = field(default_factory=dict)  # after the step
    buffers: Tensors = field(default_factory=dict)  # after the microbatches of the first data shard


def run_serial(plan: Plan, model: nn.Module, inputs: StepInputs, *, update: bool = True) -> SerialStep:
    """One step of `model`, the caller's copy, which is changed, over all shards' microbatches.

    As `plan` has it but for the layout: its precision, its numerics, the mean over what all shards count, and
    the buffers of the first shard, which are those that a data-parallel step keeps. Without `update` it ends
    at the gradients.
    """
    device = next(model.parameters()).device
    if update:
        stepper = _stepper(plan, model, inputs)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    recorder = OutputRecorder(model)
    try:
        with numerics_mode(plan.numerics):
            loss_sum, count, buffers = _forward_backward(plan, model, inputs, recorder, device)
    finally:
        recorder.close()
    used = {name: value for name, value in model.named_parameters() if value.grad is not None}
    gradients = {name: _gradient(value).to(torch.float64) for name, value in used.items()}
    squares = sum((value.square().sum() for value in gradients.values()), torch.zeros_like(count))
    divisor = count * inputs.loss_scale
    scale = gradient_scale(squares, divisor, inputs.max_grad_norm)
    # Before the step, which scales float64 gradients where they lie.
    means = {name: value / divisor for name, value in gradients.items()}
    clipped = {name: value * scale.scale for name, value in gradients.items()}
    if update and not scale.skip:
        _step(stepper, used.values(), scale)
    return SerialStep(
        loss=float(loss_sum / count),
        count=float(count),
        grad_norm=float(scale.norm),
        skipped=bool(scale.skip),
        order=tuple(recorder.order),
        trainable=tuple(name for name, value in model.named_parameters() if value.requires_grad),
        outputs=recorder.outputs,
        gradients=means,
        clipped=clipped,
        before=before,
        parameters={name: value.detach().clone() for name, value in model.named_parameters()},
        buffers=buffers,
    )


def persistent_buffers(model: nn.Module) -> Tensors:
    """Copies of the buffers that a state dictionary has, by name."""
    saved = model.state_dict().keys()
    return {name: value.detach().clone() for name, value in model.named_buffers() if name in saved}


def _forward_backward(
    plan: Plan, model: nn.Module, inputs: StepInputs, recorder: OutputRecorder, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    causal = shifts_labels(model)
    start = [(value, value.detach().clone()) for value in model.buffers()]
    kept: Tensors = {}
    for shard, batches in enumerate(inputs.shards):
        recorder.shard = shard
        inputs.seed_shard(shard)
        with torch.no_grad():
            for value, first in start:
                value.copy_(first)
        for batch in microbatches(plan, shard, batches, inputs.step):
            placed = to_device(batch, device)
            with autocast(plan.precision, device):
                output = call_model(model, placed, with_loss=inputs.loss is not None)
                part, part_count = loss_sum_and_count(output, placed, inputs.loss, causal=causal)
            if part_count.item() > 0:
                (part * inputs.loss_scale).backward()
            loss_sum += part.detach()
            count += part_count
        if shard == 0:
            kept = persistent_buffers(model)
    return loss_sum, count, kept


def _stepper(plan: Plan, model: nn.Module, inputs: StepInputs) -> torch.optim.Optimizer:
    with pure.cast(model, PRECISION_RULES[plan.precision].parameters):
        trainable = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        stepper = inputs.optimizer(trainable)
    if inputs.optimizer_state is not None:
        load_optimizer_state(stepper, model, inputs.optimizer_state)
    return stepper


def _step(stepper: torch.optim.Optimizer, used: Iterable[nn.Parameter], scale: GradientScale) -> None:
    for parameter in used:
        gradient = _gradient(parameter)
        gradient.mul_(scale.scale.to(gradient.dtype))
    stepper.step()


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    return gradient.to_dense() if gradient.is_sparse else gradient
