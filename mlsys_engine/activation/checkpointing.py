"""Applies activation actions to a model in place: a block's forward is replaced, all names stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mlsys_engine.activation.blocks import KEEP, RECOMPUTE, RECOMPUTE_SEGMENTS, SELECTIVE
from mlsys_engine.activation.forwards import (
    ChainedForward,
    KeptForward,
    RecomputedForward,
    ReplacedForward,
    SegmentedForward,
    SelectiveForward,
)
from mlsys_engine.activation.segments import ALONE, BlockChain, parse
from mlsys_engine.activation.selective import Selection
from mlsys_engine.errors import ConfigError

_FORWARDS: dict[str, Callable[[nn.Module, str], Callable[..., Any]]] = {
    KEEP: KeptForward,
    RECOMPUTE: RecomputedForward,
    RECOMPUTE_SEGMENTS: SegmentedForward,
}
_ACTIONS = (*_FORWARDS, SELECTIVE)


def apply_actions(model: nn.Module, actions: Mapping[str, str]) -> nn.Module:
    """Applies `{block name: action}`, as `resolve` gives it and a Plan holds it. Returns the same model."""
    reruns = {name: rerun for name, action in actions.items() if (rerun := parse(action)) is not None}
    for name, action in actions.items():
        if action not in _ACTIONS and name not in reruns:
            raise ConfigError(
                f"Block {name!r} was given the activation action {action!r}.",
                f"Known actions: {', '.join(_ACTIONS)}.",
                "Make the plan again with this version.",
            )
        try:
            model.get_submodule(name)
        except AttributeError:
            raise ConfigError(
                f"An activation action names the block {name!r}.",
                f"{type(model).__name__} has no module of that name.",
                "Make the plan again for this model.",
            ) from None
    chain = BlockChain(reruns) if any(rerun != ALONE for rerun in reruns.values()) else None
    selection = Selection.of(model) if SELECTIVE in actions.values() else None
    for name, action in actions.items():
        block = model.get_submodule(name)
        if isinstance(block.__dict__.get("forward"), ReplacedForward):
            continue
        shown = name or type(model).__name__
        if chain is not None and name in reruns:
            block.forward = ChainedForward(block, shown, chain, chain.position(name))
        elif selection is not None and action == SELECTIVE:
            block.forward = SelectiveForward(block, shown, selection)
        else:
            block.forward = _FORWARDS[action](block, shown)
    return model


def uncheckpoint(model: nn.Module) -> nn.Module:
    """Gives every block its own forward back, and returns the same model."""
    for block in model.modules():
        forward = block.__dict__.get("forward")
        if isinstance(forward, ReplacedForward):
            forward.remove()
    return model
