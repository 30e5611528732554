"""The tensors inside what is passed around: mappings, sequences, dataclasses and torch's pytrees of these."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in any structure with their paths (`mask`, `0.hidden`), in the order of the structure."""
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    for key, part in _parts(value):
        yield from named_tensors(part, f"{name}.{key}" if name else str(key))


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in any structure, in its order."""
    return [tensor for _, tensor in named_tensors(value)]


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with `change(tensor)` for each tensor. Mappings that torch's pytrees do not know
    (transformers' BatchEncoding) become dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if _is_dataclass(value):
        changed = copy.copy(value)
        for key, part in _parts(value):
            object.__setattr__(changed, key, map_tensors(part, change))
        return changed
    if isinstance(value, Mapping) and type(value) not in pytree.SUPPORTED_NODES:
        value = dict(value)
    leaves, spec = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return value
    return pytree.tree_unflatten([map_tensors(leaf, change) for leaf in leaves], spec)


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if _is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    leaves = pytree.tree_leaves(value)
    return [] if len(leaves) == 1 and leaves[0] is value else list(enumerate(leaves))


def _is_dataclass(value: Any) -> bool:
    # transformers' outputs are both, and keep the two in step themselves only as mappings.
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Mapping)
