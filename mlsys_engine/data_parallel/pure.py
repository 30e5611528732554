"""Training in half precision with parameters stored so: what a model and its optimizer must be for it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mlsys_engine.data_parallel.update import ScaledStep
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import PRECISION_RULES


def check(precision: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError for a model or an optimizer that would lose more than its parameters' precision."""
    if PRECISION_RULES[precision].parameters is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise ConfigError(
                f"precision={precision!r} for a model with {type(module).__name__} at {name!r}.",
                "Running statistics change by small parts of themselves, which half precision rounds away.",
                f"Use precision={_unpure(precision)!r}, or a normalisation within the sample.",
            )
    if not isinstance(optimizer, ScaledStep):
        kind = type(optimizer)
        raise ConfigError(
            f"precision={precision!r} with {kind.__module__.partition('.')[0]}'s {kind.__name__}.",
            "Parameters in half precision need an optimizer that keeps the bits they have no room for, and "
            "takes float32 gradients.",
            f"Use mls.optim's optimizers, or precision={_unpure(precision)!r}.",
        )


@torch.no_grad()
def cast_frozen(model: nn.Module, stored: torch.dtype | None) -> None:
    """Casts the float32 parameters that are not trained (None: leaves them); buffers stay as they are."""
    for parameter in model.parameters() if stored is not None else ():
        if not parameter.requires_grad and parameter.dtype is torch.float32:
            parameter.data = parameter.data.to(stored)


def _unpure(precision: str) -> str:
    return precision.removesuffix("-pure")
