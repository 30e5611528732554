"""How a batch becomes the arguments of a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mlsys_engine.errors import DataError


def call_model(model: nn.Module, batch: Any, with_loss: bool) -> Any:
    """The model's output for one microbatch.

    A mapping becomes keyword arguments; with a loss function, the keys that `forward` does not accept are
    dropped (they are the loss function's). A tuple or list becomes positional arguments; with a loss function
    only its first element is the model's. Anything else is the one argument.
    """
    if isinstance(batch, Mapping):
        accepted = _accepted(type(model).forward) if with_loss else None
        return _call(
            model, (), {key: value for key, value in batch.items() if accepted is None or key in accepted}
        )
    if isinstance(batch, list | tuple):
        return _call(model, (batch[0],) if with_loss else tuple(batch), {})
    return model(batch)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model's output; a batch that does not fit its signature is told as such."""
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as mismatch:
            given = f"the keys {', '.join(kwargs)}" if kwargs else f"{len(args)} positional arguments"
            raise DataError(
                f"{type(model).__name__}.forward was called with {given}, from the batch: {mismatch}.",
                "Without a loss function a mapping is the model's keyword arguments, a tuple or list its "
                "positional ones; with one the model takes the keys that it knows, or the first element.",
                "Pass loss=fn with fn(output, batch), or have the loader yield what forward accepts.",
            ) from error
        raise


@functools.cache
def _accepted(forward: Any) -> frozenset[str] | None:
    """Names of `forward`'s keyword arguments; None when it takes any."""
    parameters = inspect.signature(forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; tensors that are there already are not copied."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return tree_map(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf, batch
    )


def num_samples(batch: Any) -> int:
    """The size of the first dim of the first tensor in the batch: the samples of a microbatch."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    stack = [values]
    while stack:
        value = stack.pop(0)
        if isinstance(value, torch.Tensor) and value.ndim:
            return int(value.shape[0])
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, list | tuple):
            stack = [*value, *stack]
    return 1
