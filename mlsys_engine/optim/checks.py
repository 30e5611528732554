"""Refuses hyper-parameters, parameters and gradients that cannot work: given, expected, action."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.formats import STORED

# Arguments of torch's optimizers that choose between its implementations.
TORCH_SWITCHES = {"foreach", "fused", "capturable", "differentiable"}


def check_keywords(optimizer: str, given: Iterable[str], known: Container[str]) -> None:
    """Raises for keywords that an optimizer does not have, as Python would; for torch's switches says why."""
    for keyword in sorted(given):
        if keyword in TORCH_SWITCHES:
            raise ConfigError(
                f"{optimizer}({keyword}=...) was given.",
                "The native optimizers have one implementation, which is fused: there is nothing to choose.",
                f"Leave {keyword} out, or use torch's own optimizer.",
            )
        if keyword not in known:
            raise TypeError(f"{optimizer}() got an unexpected keyword argument {keyword!r}")


def check_range(name: str, value: Any, *, low: float = 0.0, below: float = math.inf) -> None:
    """`value` (a number or a one-element tensor) must be in [low, below)."""
    if not isinstance(value, Tensor | Real):
        raise ConfigError(
            f"{name}={value!r} was given.", "A number is expected.", f"Pass {name} as an int or a float."
        )
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ConfigError(
            f"{name} is a tensor of shape {tuple(value.shape)}.",
            "One element is expected.",
            "Pass a number, or a tensor without dimensions.",
        )
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return  # reading it would wait for the device
    number = float(value)
    if not low <= number < below:  # also false for nan
        upper = "" if below == math.inf else f" and below {below:g}"
        raise ConfigError(
            f"{name}={number:g} was given.",
            f"A number of at least {low:g}{upper} is expected.",
            f"Choose {name} in that range.",
        )


def check_betas(betas: Any) -> None:
    """What two running means keep of themselves in a step: each in [0, 1)."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ConfigError(
            f"betas={betas!r} was given.", "Two numbers are expected.", "Pass for example betas=(0.9, 0.999)."
        )
    for index, beta in enumerate(betas):
        check_range(f"betas[{index}]", beta, below=1.0)


def check_max_grad_norm(max_grad_norm: float | None) -> None:
    """A norm to clip to must be positive; None is no clipping."""
    if max_grad_norm is not None and not max_grad_norm > 0:  # also for nan
        raise ConfigError(
            f"max_grad_norm={max_grad_norm}.",
            "It is a positive norm, or None.",
            "Leave it out to not clip.",
        )


def check_flag_is_off(group: dict[str, Any], name: str, action: str) -> None:
    """A switch of torch's optimizers that the native ones do not have must be off."""
    if group.get(name):
        raise ConfigError(f"{name}={group[name]} is set.", "The native optimizer does not have it.", action)


def check_parameter(parameter: Tensor, name: str, *, whole: bool = False) -> None:
    """Called for every parameter that joins an optimizer; `whole`: for rules that need whole tensors."""
    if whole and hasattr(parameter, "placements"):
        raise ConfigError(
            f"{name} is {describe(parameter)}.",
            "This rule works on whole tensors, and a DTensor's local shard is a part of one.",
            "Use a rule that works element by element, such as mls.optim.AdamW, for sharded parameters.",
        )
    if any(placement.is_partial() for placement in getattr(parameter, "placements", ())):
        raise ConfigError(
            f"{name} is {describe(parameter)}.",
            "Sharded and replicated placements are expected; a partial one is a sum that was not taken yet.",
            "Redistribute it to Shard or Replicate before building the optimizer.",
        )
    if parameter.layout != torch.strided:
        raise ConfigError(
            f"{name} is {parameter.layout}.",
            "Dense parameters are expected.",
            "Build the layer with sparse=False, or use torch.optim.SparseAdam for it.",
        )
    if parameter.is_complex():
        raise ConfigError(
            f"{name} is complex ({_short(parameter.dtype)}).",
            "Real parameters are expected.",
            "Optimise torch.view_as_real(parameter), or use torch.optim for it.",
        )
    if parameter.dtype not in STORED:
        raise ConfigError(
            f"{name} is {_short(parameter.dtype)}.",
            "float32, bf16 or fp16 parameters are expected.",
            "Convert the model, with model.float() for example, or use torch.optim.",
        )


def check_gradient(gradient: Tensor, parameter: Tensor, name: str) -> None:
    """Called for a gradient whose layout differs from its parameter's, to say why it cannot be used."""
    if gradient.layout != torch.strided:
        raise ConfigError(
            f"The gradient of {name} is {gradient.layout}.",
            "Dense gradients are expected.",
            "Build the embedding with sparse=False, or use torch.optim.SparseAdam for it.",
        )
    if (
        gradient.dtype not in STORED
        or gradient.device != parameter.device
        or gradient.shape != parameter.shape
    ):
        raise ConfigError(
            f"The gradient of {name} is {describe(gradient)}.",
            f"{describe(parameter)} is expected, like the parameter; float32, bf16 and fp16 will do.",
            "Convert it before step().",
        )


def describe(tensor: Tensor) -> str:
    """Type, shape and device of a tensor, for messages; for a DTensor also how it is laid out."""
    placements = getattr(tensor, "placements", None)
    laid_out = "" if placements is None else f" as {placements} over {tensor.device_mesh}"  # type: ignore[attr-defined]
    return f"{_short(tensor.dtype)} {tuple(tensor.shape)} on {tensor.device}{laid_out}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
