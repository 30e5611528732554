"""Chooses the blocks of a model that a policy acts on, by name."""

from __future__ import annotations

from torch import nn

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.trace.blocks import is_composite, repeated_modules

KEEP = "keep"
RECOMPUTE = "recompute"
RECOMPUTE_SEGMENTS = "recompute segments"
SELECTIVE = "selective"
FULL = "full"
POLICIES = (FULL, SELECTIVE)


def resolve(model: nn.Module, policy: str | None) -> dict[str, str]:
    """The action for each block that the policy touches: `{block name: action}`; empty without a policy.

    "full" recomputes every block; "selective" computes the outputs of cheap operations in them again. Blocks
    are the composite members of the outermost containers (ModuleList, ModuleDict, Sequential; a container
    of composite members alone inside a container is a stage, whose members are blocks), as transformers and
    residual networks are built. Without any: a Sequential of plain layers is recomputed in
    about sqrt(layers) segments ("selective" takes it as one block); else each composite child is a block;
    else the whole model is one block, which keeps nothing until the backward but cannot lower the backward's
    peak. Raises ConfigError for an unknown policy.
    """
    if policy is None:
        return {}
    if policy not in POLICIES:
        raise _unknown_policy(policy)
    action = SELECTIVE if policy == SELECTIVE else RECOMPUTE
    blocks = repeated_modules(model)
    if blocks:
        return dict.fromkeys(blocks, action)
    chains = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential) and len(module) > 2
    ]
    if chains:
        return dict.fromkeys(chains, SELECTIVE if policy == SELECTIVE else RECOMPUTE_SEGMENTS)
    composite = [name for name, child in model.named_children() if is_composite(child)]
    return dict.fromkeys(composite or [""], action)


def _unknown_policy(policy: object) -> ConfigError:
    return ConfigError(
        f"policy={policy!r} was given to activation checkpointing.",
        f"Known policies: {', '.join(POLICIES)}, or None.",
        did_you_mean(str(policy), POLICIES),
    )
