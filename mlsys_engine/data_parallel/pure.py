"""Training in half precision with parameters stored so: what a model and its optimizer must be for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mlsys_engine.data_parallel.update import ScaledStep
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import PRECISION_RULES


def check_model(precision: str, model: nn.Module) -> None:
    """Raises ConfigError for a model that would lose more than its parameters' precision."""
    if PRECISION_RULES[precision].parameters is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise ConfigError(
                f"precision={precision!r} for a model with {type(module).__name__} at {name!r}.",
                "Running statistics change by small parts of themselves, which half precision rounds away.",
                f"Use precision={_unpure(precision)!r}, or a normalisation within the sample.",
            )


def check_optimizer(precision: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises ConfigError for an optimizer that would round every update to the parameters' type."""
    if PRECISION_RULES[precision].parameters is not None and not isinstance(optimizer, ScaledStep):
        kind = type(optimizer)
        raise ConfigError(
            f"precision={precision!r} with {kind.__module__.partition('.')[0]}'s {kind.__name__}.",
            "Parameters in half precision need an optimizer that keeps the bits they have no room for, and "
            "takes float32 gradients.",
            f"Use mls.optim's optimizers, or precision={_unpure(precision)!r}.",
        )


@contextmanager
def cast(model: nn.Module, stored: torch.dtype | None) -> Iterator[None]:
    """Casts all float32 parameters, frozen ones too (None: none); they are back when something raises.

    Before the optimizer is made, so that it knows what it will step. Buffers stay as they are.
    """
    before = {
        parameter: parameter.data
        for parameter in model.parameters()
        if stored is not None and parameter.dtype is torch.float32
    }
    for parameter, data in before.items():
        parameter.data = data.to(stored)
    try:
        yield
    except BaseException:  # an interrupt, too, must not leave the caller's model cast
        for parameter, data in before.items():
            parameter.data = data
        raise


def _unpure(precision: str) -> str:
    return precision.removesuffix("-pure")
