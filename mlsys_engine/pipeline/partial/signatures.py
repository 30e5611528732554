"""The form of values without their numbers: what skeletons and messages are remembered by."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True)
class Form:
    """Of one tensor: its shape, strides, dtype, and whether it needs a gradient."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def meta(self) -> torch.Tensor:
        """A meta tensor of this form; where it needs a gradient it is a leaf."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        return made.requires_grad_(self.requires_grad)


def signature_of(value: Any) -> Hashable:
    """What two values have in common that are computed by the same calls: structure, forms and plain values.

    Objects of other types count by their type alone.
    """
    if isinstance(value, torch.Tensor):
        return Form.of(value)
    if isinstance(value, _PLAIN):
        # 1, 1.0 and True are equal, but not the same to the code that gets them.
        return (type(value).__name__, value)
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        leaves = pytree.tree_leaves(value)
        parts = [] if len(leaves) == 1 and leaves[0] is value else leaves
    return (type(value), *map(signature_of, parts))
