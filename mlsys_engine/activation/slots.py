"""What autograd stores in the place of saved tensors: slots, whose value comes back when it is asked for.

Ownership: autograd nodes own slots; the slots of one storage share a recipe; a recipe owns what it needs to
make the value again (packed tensors, or nodes that come before all of its slots' nodes). A recipe's value
lives from the first reading of a slot to the last one. Threading: under the GIL; a backward may run in
another thread than its forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mlsys_engine.activation.checksum import checksum
from mlsys_engine.activation.recompute import RecomputeMismatchError
from mlsys_engine.memory import Observe

Rebuild = Callable[[], Tensor]
Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Running(threading.local):
    depth = 0  # recipes that compute in this thread: what they read is not a backward's reading


RUNNING = _Running()


class Maker(Protocol):
    """Who makes recipes: one call of a block."""

    name: str  # as users know the block
    observe: Observe | None  # told of each value while it lives


class Recipe:
    """How the storage of saved tensors comes back, and its value while somebody needs it.

    It holds the storage weakly, so that the address is not given to another storage while the recipe lives.
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_checksum",
        "_how",
        "_num_bytes",
        "_observe",
        "_pin",
        "_rebuild",
        "_round",
        "_token",
        "_unread",
        "_value",
        "dtype",
        "num_slots",
        "version",
    )

    def __init__(self, maker: Maker, how: str, again: Rebuild, tensor: Tensor, checks: bool) -> None:
        storage = tensor.untyped_storage()
        self._block, self._how, self._rebuild = maker.name, how, again
        self._pin = StorageWeakRef(storage)
        self._num_bytes = storage.nbytes()
        self._observe = maker.observe
        self._value: Tensor | None = None
        self._token: object = None
        self._round = self._unread = self.num_slots = 0
        self.version, self.dtype = tensor._version, tensor.dtype
        layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        self._checksum = (layout, checksum(tensor)) if checks else None

    def is_of(self, tensor: Tensor) -> bool:
        """Whether the storage, which is the tensor's, still holds what this recipe makes."""
        return self.version == tensor._version and self.dtype is tensor.dtype

    def read(self, slot: Slot) -> Tensor:
        value = self._value
        if value is None:
            value = self._compute()
        if not RUNNING.depth and slot.round != self._round:
            slot.round = self._round
            self._has_been_read()
        if value.size() == slot.size and value.stride() == slot.stride:
            return value
        return value.as_strided(slot.size, slot.stride, slot.offset)

    def forget(self, slot: Slot) -> None:
        """The slot has died; unread ones count as read."""
        self.num_slots -= 1
        if self._value is not None and slot.round != self._round:
            self._has_been_read()

    def _has_been_read(self) -> None:
        self._unread -= 1
        if self._unread <= 0:
            self._value = self._token = None

    def _compute(self) -> Tensor:
        RUNNING.depth += 1
        try:
            with torch.no_grad():
                if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                        value = self._rebuild()
                else:
                    value = self._rebuild()
        finally:
            RUNNING.depth -= 1
        if value.untyped_storage().nbytes() != self._num_bytes:
            raise self._mismatch(f"{value.untyped_storage().nbytes()} bytes instead of {self._num_bytes}")
        if self._checksum is not None:
            layout, expected = self._checksum
            found = checksum(value.as_strided(*layout))
            if expected is not None and found is not None and not torch.equal(found, expected):
                raise self._mismatch("other values")
            self._checksum = None
        self._value, self._unread = value, self.num_slots
        self._round += 1
        self._token = None if self._observe is None else self._observe(value)
        return value

    def _mismatch(self, difference: str) -> RecomputeMismatchError:
        return RecomputeMismatchError(f"block {self._block!r} gave {difference} when {self._how}")


class Slot:
    """What autograd stores for a dropped tensor."""

    __slots__ = ("offset", "recipe", "round", "size", "stride")

    def __init__(self, recipe: Recipe, tensor: Tensor) -> None:
        self.recipe, self.round = recipe, 0
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        recipe.num_slots += 1

    def __del__(self) -> None:
        self.recipe.forget(self)


class Passed:
    """A tensor that is kept by hooks around the block. They are asked once a backward.

    A recompute frame gives each tensor once, and runs again when it is asked again.
    """

    __slots__ = ("_packed", "_unpack", "_value")

    def __init__(self, outer: Hooks, tensor: Tensor) -> None:
        self._packed, self._unpack = outer[0](tensor), outer[1]
        self._value: Tensor | None = None

    def read(self) -> Tensor:
        value = self._unpack(self._packed) if self._value is None else self._value
        self._value = value if RUNNING.depth else None  # the node itself reads it later
        return value
