"""A model that lives in arenas refuses what would move it out of them, and says what to do instead."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mlsys_engine.errors import ConfigError

_GUARDED = ("_apply", "load_state_dict")  # `_apply` is what .to(), .cuda(), .half(), .to_empty() go through


class _Guard:
    """Stands in for one method of one module. Copies and pickles of the module get the plain method back."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def plain(self) -> Callable[..., Any]:
        return _plain_method(self.module, self.name)

    def __reduce__(self) -> Any:
        return _plain_method, (self.module, self.name)


class _ApplyGuard(_Guard):
    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        with torch.no_grad():
            here = [tensor for tensor in self.module.parameters(recurse) if not tensor.is_meta]
            moved = any(_differs(fn(tensor), tensor) for tensor in here)
            has_absent = len(here) < sum(1 for _ in self.module.parameters(recurse))
        if not moved and has_absent:  # parameters of other ranks, which have nothing to convert
            return self.module
        if not moved:
            return self.plain()(fn, recurse)
        raise ConfigError(
            "A conversion (.to(), .cuda(), .half(), ...) was asked of a model that mls.apply has laid out.",
            "Its parameters stay where the optimizer and the collectives know them.",
            "Convert it before mls.apply, or load runner.state_dict(full=True)['model'] into a new model.",
        )


def _differs(converted: torch.Tensor, tensor: torch.Tensor) -> bool:
    return converted is not tensor and (
        converted.data_ptr() != tensor.data_ptr()
        or converted.dtype != tensor.dtype
        or converted.device != tensor.device
    )


class _LoadGuard(_Guard):
    def __call__(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign:
            raise ConfigError(
                "load_state_dict(assign=True) was asked of a model that mls.apply has laid out.",
                "Its parameters stay where the optimizer and the collectives know them.",
                "Use load_state_dict without assign (it copies in place), or runner.load_state_dict.",
            )
        return self.plain()(state_dict, strict=strict)


def check_unguarded(model: nn.Module) -> None:
    """Raises ConfigError for a model that another runner has."""
    for module in model.modules():
        if isinstance(module.__dict__.get("_apply"), _Guard):
            raise ConfigError(
                f"{type(module).__name__} is already laid out by an earlier mls.apply or mls.wrap.",
                "A module belongs to one runner.",
                "Use that runner, close it first with runner.close(), or build a new model.",
            )


def guard(model: nn.Module) -> None:
    """Installs the refusals on every module of the model."""
    for module in model.modules():
        module.__dict__["_apply"] = _ApplyGuard(module, "_apply")
        module.__dict__["load_state_dict"] = _LoadGuard(module, "load_state_dict")


def release(model: nn.Module) -> None:
    """Takes the refusals away."""
    for module in model.modules():
        for name in _GUARDED:
            module.__dict__.pop(name, None)


def _plain_method(module: nn.Module, name: str) -> Callable[..., Any]:
    return types.MethodType(getattr(type(module), name), module)
