"""Runs a model once for its trace: on fakes, or on its own tensors where fakes do not tell enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlsys_engine.trace.fakes import attributes_restored, buffers_restored, faked
from mlsys_engine.trace.structure import map_tensors, tensors_of
from mlsys_engine.trace.walk import Walk

Call = Callable[[nn.Module, Any], Any]
EXECUTION = "execution"


def call_plainly(model: nn.Module, sample: Any) -> Any:
    """The default convention: a mapping as keywords, a tuple or list as positions, anything else as it is."""
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, list | tuple) else model(sample)


@dataclass(frozen=True, kw_only=True)
class Executed:
    """A walk that came to its end. `gradients` is EXECUTION, or "none: <why>"."""

    walk: Walk
    gradients: str
    has_saved: bool
    has_backward: bool


def execute_on_fakes(
    model: nn.Module, sample: Any, call: Call, blocks: list[str], gradients: bool
) -> Executed:
    """Runs `call(model, sample)` and its backward on fakes; without gradients where only that works.

    Raises whatever the model raises: data-dependent control flow cannot run without data.
    """
    why = "none: they were not asked for"
    if gradients:
        try:
            with faked(model, sample) as fake_sample, torch.enable_grad():
                # The gradients of fakes go where the fakes go.
                return _forward_and_backward(model, fake_sample, call, blocks, torch.Tensor.backward)
        except Exception as error:
            why = f"none: the forward with gradients on fake tensors raised {type(error).__name__}"
    with faked(model, sample) as fake_sample, torch.no_grad():
        walk = Walk(model, blocks)
        walk.forward(lambda: call(model, fake_sample), fake_sample)
    return Executed(walk=walk, gradients=why, has_saved=False, has_backward=False)


def execute_on_data(model: nn.Module, sample: Any, call: Call, blocks: list[str]) -> Executed:
    """The same on the model's own tensors: buffers, random states and attributes are put back afterwards."""
    own = map_tensors(sample, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def backward(loss: torch.Tensor) -> None:
        # Not loss.backward(): that would add to gradients and call whoever waits for them.
        torch.autograd.grad(loss, parameters, allow_unused=True)

    with attributes_restored(model), buffers_restored(model), torch.enable_grad():
        return _forward_and_backward(model, own, call, blocks, backward)


def _forward_and_backward(
    model: nn.Module,
    sample: Any,
    call: Call,
    blocks: list[str],
    backward: Callable[[torch.Tensor], object],
) -> Executed:
    walk = Walk(model, blocks)
    output = walk.forward(lambda: call(model, sample), sample)
    loss = _scalar(output)
    why = EXECUTION
    if loss is None:
        why = "none: nothing that the model returns needs a gradient"
    else:
        try:
            walk.backward(lambda: backward(loss))
        except Exception as error:  # of an operation without a backward, or of one that fakes do not know
            why = f"none: the backward raised {type(error).__name__}"
    return Executed(walk=walk, gradients=why, has_saved=True, has_backward=why == EXECUTION)


def _scalar(output: Any) -> torch.Tensor | None:
    """Something to start the backward from: the output's own loss, or the sum of what needs a gradient."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        return loss.sum()
    parts = [tensor.float().sum() for tensor in tensors_of(output) if tensor.requires_grad]
    return torch.stack(parts).sum() if parts else None
