"""Which modules of a model are its blocks: what repeats, and what is cut, recomputed or placed as one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def repeated_modules(model: nn.Module) -> list[str]:
    """FQNs of the composite members of the outermost containers (ModuleList, ModuleDict, Sequential).

    So transformers and residual networks are built. A container of composite members alone inside a container
    is a stage, whose members are blocks. Empty for a model without such containers.
    """
    return list(_members_of_containers("", model))


def block_names(model: nn.Module) -> list[str]:
    """FQNs of the blocks: the repeated modules, else the composite children, else the plain layers."""
    composite = [name for name, child in model.named_children() if is_composite(child)]
    return repeated_modules(model) or composite or list(_plain_layers(model))


def is_composite(module: nn.Module) -> bool:
    """Whether the module has layers, and a forward of its own that runs them."""
    return bool(list(module.children())) and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def _members_of_containers(path: str, module: nn.Module) -> Iterator[str]:
    prefix = f"{path}." if path else ""
    children = list(module.named_children())
    in_container = isinstance(module, _CONTAINERS)
    for name, child in children:
        inner = list(_members_of_containers(f"{prefix}{name}", child))
        if in_container and is_composite(child) and not _is_stage(child):
            yield f"{prefix}{name}"
        else:
            yield from inner


def _plain_layers(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):  # never called itself
            yield from _plain_layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _is_stage(module: nn.Module) -> bool:
    """Whether it is a row of blocks rather than a block."""
    return isinstance(module, _CONTAINERS) and all(is_composite(child) for child in module.children())
