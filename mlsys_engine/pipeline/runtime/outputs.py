"""A model's output from the rank of the last stage to all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in the structure that goes ahead."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def broadcast(output: Any, source: int, group: dist.ProcessGroup, device: torch.device) -> Any:
    """`output` of the group's rank `source` on all of its ranks; tensors arrive without history."""
    tensors: list[torch.Tensor] = []

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tensors.append(leaf.detach().contiguous())
        return _Place(len(tensors) - 1, tuple(leaf.shape), leaf.dtype)

    is_source = dist.get_rank(group) == source
    structure = [tree_map(placed, output) if is_source else None]
    dist.broadcast_object_list(structure, group=group, group_src=source, device=device)
    arrived: list[torch.Tensor] = []

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, _Place):
            return leaf
        own = tensors[leaf.index] if is_source else torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
        if own.numel():
            # Bytes: not every backend has every type.
            dist.broadcast(own.view(-1).view(torch.uint8), group=group, group_src=source)
        arrived.append(own)
        return own

    whole = tree_map(filled, structure[0])
    return output if is_source else whole
