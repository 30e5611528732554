"""Stores a storage that autograd saves in another form: masks as bits, the rest as an option says."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlsys_engine.activation.packing import FORMS, Packed, pack
from mlsys_engine.activation.slots import Hooks, Passed, Rebuild
from mlsys_engine.memory import Observe

MASK = "mask"
_PROBED = 64  # elements that tell nearly every tensor from a mask
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def takes(form: str, dtype: torch.dtype) -> bool:
    """Whether tensors of that type can be stored in that form."""
    return form in FORMS and dtype in FORMS[form].dtypes


def store(flat: Tensor, form: str, outer: Hooks | None, observe: Observe | None) -> Rebuild:
    """Stores a flat tensor in a form, and gives the function that makes it again.

    With `outer` hooks these keep what is packed; else `observe`, if any, is told of it.
    """
    return _keep(pack(flat, form), outer, observe)


def store_mask(flat: Tensor, outer: Hooks | None, observe: Observe | None) -> Rebuild | None:
    """As `store`, for what is a mask; None for anything else, which a few elements show in nearly all cases.

    A mask is boolean, or has zeros and one other value, bit for bit: what dropout multiplies with on the CPU.
    """
    if flat.dtype is torch.bool:
        return store(flat, MASK, outer, observe)
    if flat.device.type != "cpu" or not flat.dtype.is_floating_point:
        return None
    bits = flat.view(_INTEGERS[flat.element_size()])
    values = set(bits[:_PROBED].tolist()) - {0}
    if len(values) != 1:
        return None
    is_set = bits != 0
    if not torch.equal(is_set, bits == values.pop()):
        return None
    scale = float(flat[is_set.int().argmax()])
    return _ScaledMask(_keep(pack(is_set, MASK), outer, observe), flat.dtype, scale)


def _keep(packed: Packed, outer: Hooks | None, observe: Observe | None) -> Rebuild:
    if outer is not None:
        empty = replace(packed, data=packed.data.new_empty(0))
        return _Elsewhere(empty, Passed(outer, packed.data))
    return _Here(packed, None if observe is None else observe(packed.data))


@dataclass(frozen=True, slots=True)
class _Here:
    packed: Packed
    token: object  # of who measures; counts the packed bytes while it lives

    def __call__(self) -> Tensor:
        return self.packed.unpack()


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """Hooks around the block keep what is packed."""

    empty: Packed
    data: Passed

    def __call__(self) -> Tensor:
        return replace(self.empty, data=self.data.read()).unpack()


@dataclass(frozen=True, slots=True)
class _ScaledMask:
    mask: Rebuild
    dtype: torch.dtype
    scale: float

    def __call__(self) -> Tensor:
        return self.mask().to(self.dtype).mul_(self.scale)
