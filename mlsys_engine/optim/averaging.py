"""The moving average of the weights that an optimizer keeps with `ema=`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.formats import EMA_KEY


@contextmanager
def averaged_weights(optimizer: NativeOptimizer) -> Iterator[None]:
    """Within it the parameters hold their moving averages, for evaluation; afterwards their own values again.

    Parameters that have not stepped yet stay what they are. Raises ConfigError for an optimizer without
    averages.
    """
    if all(group.get("ema") is None for group in optimizer.param_groups):
        raise ConfigError(
            f"{type(optimizer).__name__} keeps no average of the weights.",
            "An optimizer built with ema= does.",
            "Build one with it, such as mls.optim.AdamW(..., ema=0.999).",
        )
    kept = []
    try:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    average = optimizer.state.get(parameter, {}).get(EMA_KEY)
                    if average is not None:
                        kept.append((parameter, parameter.detach().clone()))
                        parameter.copy_(average)
        yield
    finally:
        with torch.no_grad():
            for parameter, own in kept:
                parameter.copy_(own)
