"""What autograd keeps for the backward, counted while a forward runs: in all, and for each open call.

The rules are those of mls.memory.SavedActivationMeter, which measures real training.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class SavedBytes:
    """A count of saved storages, each once, as long as anything saved holds them."""

    def __init__(self) -> None:
        self.current_bytes = 0
        self._holders: dict[int, int] = {}  # storage -> how many saved tensors hold it

    def add(self, storage: torch.UntypedStorage) -> None:
        holders = self._holders.get(storage._cdata, 0)
        self._holders[storage._cdata] = holders + 1
        if not holders:
            self.current_bytes += storage.nbytes()

    def remove(self, storage: torch.UntypedStorage) -> None:
        self._holders[storage._cdata] -= 1
        if not self._holders[storage._cdata]:
            del self._holders[storage._cdata]
            self.current_bytes -= storage.nbytes()


class Held:
    """What is stored instead of a saved tensor. It keeps the storage, whose address is its key."""

    __slots__ = ("counts", "storage", "tensor")

    def __init__(self, tensor: torch.Tensor, counts: tuple[SavedBytes, ...]) -> None:
        self.tensor = tensor.detach()  # the tensor itself may own the node that owns this object
        self.storage, self.counts = tensor.untyped_storage(), counts
        for count in counts:
            count.add(self.storage)

    def __del__(self) -> None:
        for count in self.counts:
            count.remove(self.storage)


def storages_of(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    """Keys of the tensors' storages, valid while the tensors live."""
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)


def is_counted(tensor: torch.Tensor, excluded: frozenset[int]) -> bool:
    """Whether a saved tensor is an activation: neither a parameter or a view of one, nor in `excluded`."""
    base = tensor if tensor._base is None else tensor._base
    if isinstance(base, nn.Parameter) or (base.requires_grad and base.is_leaf):
        return False
    return tensor.untyped_storage()._cdata not in excluded
