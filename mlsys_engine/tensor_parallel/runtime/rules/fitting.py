"""Brings arguments of one function to the same cut."""

from __future__ import annotations

import torch

from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor
from mlsys_engine.tensor_parallel.sharding import Sharding


def fitted(
    context: Context, tensor: torch.Tensor, lead: CutTensor, from_end: int | None = None
) -> torch.Tensor:
    """This rank's part of `tensor`, cut as `lead` is, at the dim `from_end` (that of `lead` when None).

    A dim of length 1, or none, is broadcast: the tensor stays whole. Its gradient is summed over ranks.
    """
    dim = lead.from_end if from_end is None else from_end
    parts = lead.sharding.parts
    if isinstance(tensor, CutTensor):
        if tensor.from_end == dim and tensor.sharding.parts == parts:
            return tensor.local
        tensor = context.whole(tensor)
    if tensor.dim() < -dim or tensor.shape[dim] == 1:
        return context.entered(tensor)
    return context.taken(tensor, Sharding(dim=dim % tensor.dim(), parts=parts))


def broadcasts(tensor: torch.Tensor, from_end: int) -> bool:
    """Whether the tensor has no length of its own along a dim."""
    return tensor.dim() < -from_end or tensor.shape[from_end] == 1
