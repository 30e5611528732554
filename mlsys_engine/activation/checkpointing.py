"""Applies activation actions to a model in place: a block's forward is replaced, all names stay."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mlsys_engine.activation.blocks import KEEP, RECOMPUTE, RECOMPUTE_SEGMENTS
from mlsys_engine.activation.forwards import (
    ChainedForward,
    KeptForward,
    RecomputedForward,
    ReplacedForward,
    SavingForward,
    SegmentedForward,
)
from mlsys_engine.activation.options import OFFLOAD, OPTIONS
from mlsys_engine.activation.saving import Saving, SavingContext
from mlsys_engine.activation.segments import BlockChain, parse
from mlsys_engine.errors import ConfigError

_ACTIONS = (KEEP, RECOMPUTE, RECOMPUTE_SEGMENTS, *OPTIONS)


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
    chain = BlockChain(reruns) if any(not rerun.is_alone for rerun in reruns.values()) else None
    context = SavingContext.of(model)
    offloads = any(action.endswith(OFFLOAD) for action in actions.values())
    takes_cache = not reruns and RECOMPUTE_SEGMENTS not in actions.values()
    for name, action in actions.items():
        block = model.get_submodule(name)
        if isinstance(block.__dict__.get("forward"), ReplacedForward):
            continue
        shown, rerun = name or type(model).__name__, reruns.get(name)
        option = OPTIONS.get(action if rerun is None else rerun.option)
        saving = None if option is None else Saving(block, shown, option, context)
        if rerun is not None and chain is not None:
            block.forward = ChainedForward(block, shown, chain, chain.position(name), saving)
        elif rerun is not None:
            block.forward = RecomputedForward(block, shown, saving)
        elif saving is not None:
            block.forward = SavingForward(block, shown, saving)
        elif action == KEEP:
            block.forward = KeptForward(block, shown, takes_cache, context.offloader if offloads else None)
        else:
            block.forward = SegmentedForward(block, shown)
    return model


def uncheckpoint(model: nn.Module) -> nn.Module:
    """Gives every block its own forward back, and returns the same model."""
    for block in model.modules():
        forward = block.__dict__.get("forward")
        if isinstance(forward, ReplacedForward):
            forward.remove()
    return model
