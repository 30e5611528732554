"""Chooses the blocks of a model that a policy acts on, by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from mlsys_engine.errors import ConfigError, did_you_mean

KEEP = "keep"
RECOMPUTE = "recompute"
RECOMPUTE_SEGMENTS = "recompute segments"
SELECTIVE = "selective"
FULL = "full"
POLICIES = (FULL, SELECTIVE)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


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
    blocks = list(_members_of_containers("", model))
    if blocks:
        return dict.fromkeys(blocks, action)
    chains = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential) and len(module) > 2
    ]
    if chains:
        return dict.fromkeys(chains, SELECTIVE if policy == SELECTIVE else RECOMPUTE_SEGMENTS)
    composite = [name for name, child in model.named_children() if _is_composite(child)]
    return dict.fromkeys(composite or [""], action)


def _members_of_containers(path: str, module: nn.Module) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    children = list(module.named_children())
    in_container = isinstance(module, _CONTAINERS)
    for name, child in children:
        inner = list(_members_of_containers(f"{prefix}{name}", child))
        if in_container and _is_composite(child) and not _is_stage(child):
            yield f"{prefix}{name}"
        else:
            yield from inner


def _is_stage(module: nn.Module) -> bool:
    """Whether it is a row of blocks rather than a block."""
    return isinstance(module, _CONTAINERS) and all(_is_composite(child) for child in module.children())


def _is_composite(module: nn.Module) -> bool:
    """Whether recomputing the module as one block can pay: it has layers, and a forward to replace."""
    return bool(list(module.children())) and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _unknown_policy(policy: object) -> ConfigError:
    return ConfigError(
        f"policy={policy!r} was given to activation checkpointing.",
        f"Known policies: {', '.join(POLICIES)}, or None.",
        did_you_mean(str(policy), POLICIES),
    )
