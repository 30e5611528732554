"""Runs a block so that the outputs of its cheap operations are not kept, but computed again when asked for.

No block is run twice. A pack hook looks at every tensor that autograd saves in the block: the output of a
norm, an activation function, a product or a cast is dropped when `cheap_operations` can compute it again from
what autograd keeps anyway. Korthikanti et al. 2022 drop whole parts of a block; here single tensors go, and
nothing but them is computed again.

Ownership: autograd nodes own slots; the slots of one storage share a recipe; a recipe owns nodes that come
before all of its slots' nodes. A recipe's value lives from the first reading of a slot to the last one.
Threading: under the GIL; a backward may run in another thread than its forward.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mlsys_engine.activation.cheap_operations import (
    CHEAP,
    MAY_BE_IN_PLACE,
    VIEWS,
    Rebuild,
    layer_norm,
    rebuild,
)
from mlsys_engine.activation.checksum import checksum
from mlsys_engine.activation.recompute import RecomputeMismatchError, transform_error
from mlsys_engine.memory import SavedActivationMeter, current_observer

_LEAST_BYTES = 4096  # below, a slot costs more than it spares

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


class _Running(threading.local):
    depth = 0  # recipes that compute in this thread: what they read is not a backward's reading


_RUNNING = _Running()


class Selection:
    """What the selective blocks of a model share: recipes that live, and the eps of its LayerNorms.

    A recipe is found by its storage's address. It holds the storage weakly, so that the address is not given
    to another storage while the recipe lives; its entry goes before that.
    """

    def __init__(self, candidates: tuple[float, ...]) -> None:
        self.candidates = candidates
        self.recipes: weakref.WeakValueDictionary[int, _Recipe] = weakref.WeakValueDictionary()
        self._eps: dict[int, tuple[weakref.ref[Tensor], float | None]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Selection:
        names = ("eps", "variance_epsilon")
        found = (getattr(module, name, None) for module in model.modules() for name in names)
        return cls(tuple(dict.fromkeys(eps for eps in found if isinstance(eps, float))))

    def __reduce__(self) -> tuple[type[Selection], tuple[tuple[float, ...]]]:
        return type(self), (self.candidates,)  # copies and pickles have other parameters and no tensors

    def eps_of(self, node: Any) -> float | None:
        """The eps that gives the deviation that the LayerNorm's node saved, bit for bit; None without one."""
        weight = getattr(node.next_functions[1][0], "variable", None)
        known = self._eps.get(id(weight))
        if weight is not None and known is not None and known[0]() is weight:
            return known[1]
        found = next(
            (eps for eps in self.candidates if torch.equal(layer_norm(node, eps)[2], node._saved_result2)),
            None,
        )
        if weight is not None:
            self._eps[id(weight)] = (weakref.ref(weight), found)
        return found


class _Recipe:
    """How the storage of dropped tensors is computed again, and its value while somebody needs it."""

    __slots__ = (
        "__weakref__",
        "_block",
        "_checksum",
        "_num_bytes",
        "_observe",
        "_operation",
        "_pin",
        "_rebuild",
        "_round",
        "_token",
        "_unread",
        "_value",
        "num_slots",
    )

    def __init__(self, block: _Block, operation: str, again: Rebuild, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._block, self._operation, self._rebuild = block.name, operation, again
        self._pin = StorageWeakRef(storage)
        self._num_bytes = storage.nbytes()
        self._observe = block.observe
        self._value: Tensor | None = None
        self._token: object = None
        self._round = self._unread = self.num_slots = 0
        layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        self._checksum = (layout, checksum(tensor)) if block.checks else None

    def read(self, slot: _Slot) -> Tensor:
        value = self._value
        if value is None:
            value = self._compute()
        if not _RUNNING.depth and slot.round != self._round:
            slot.round = self._round
            self._has_been_read()
        if value.size() == slot.size and value.stride() == slot.stride:
            return value
        return value.as_strided(slot.size, slot.stride, slot.offset)

    def forget(self, slot: _Slot) -> None:
        """The slot has died; unread ones count as read."""
        self.num_slots -= 1
        if self._value is not None and slot.round != self._round:
            self._has_been_read()

    def _has_been_read(self) -> None:
        self._unread -= 1
        if self._unread <= 0:
            self._value = self._token = None

    def _compute(self) -> Tensor:
        _RUNNING.depth += 1
        try:
            with torch.no_grad():
                if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                        value = self._rebuild()
                else:
                    value = self._rebuild()
        finally:
            _RUNNING.depth -= 1
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
        operation = self._operation.removesuffix("Backward0")
        return RecomputeMismatchError(
            f"block {self._block!r} gave {difference} when its operation {operation} was computed again from "
            f"what autograd had saved"
        )


class _Slot:
    """What autograd stores for a dropped tensor."""

    __slots__ = ("offset", "recipe", "round", "size", "stride")

    def __init__(self, recipe: _Recipe, tensor: Tensor) -> None:
        self.recipe, self.round = recipe, 0
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        recipe.num_slots += 1

    def __del__(self) -> None:
        self.recipe.forget(self)


class _Passed:
    """A tensor that is kept by hooks around the block. They are asked once a backward.

    A recompute frame gives each tensor once, and runs again when it is asked again.
    """

    __slots__ = ("_packed", "_unpack", "_value")

    def __init__(self, outer: Hooks, tensor: Tensor) -> None:
        self._packed, self._unpack = outer[0](tensor), outer[1]
        self._value: Tensor | None = None

    def read(self) -> Tensor:
        value = self._unpack(self._packed) if self._value is None else self._value
        self._value = value if _RUNNING.depth else None  # the node itself reads it later
        return value


class _Block:
    """The hooks of one call of a block."""

    def __init__(self, region: SelectiveRegion, outer: Hooks | None) -> None:
        self.name, self.selection, self.checks = region.name, region.selection, region.checks
        self.observe = current_observer()
        self._outer = outer
        # Reading a tensor that hooks of others have packed, such as a recompute frame's, is left to the
        # backward: eps is then not looked for.
        self._may_read = outer is None or outer[1] is SavedActivationMeter.read_saved

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Any:
        node = tensor.grad_fn
        if node is not None and tensor.nbytes >= _LEAST_BYTES and type(tensor) is Tensor:
            recipe = self._recipe(tensor, node)
            if recipe is not None:
                return _Slot(recipe, tensor)
        if self._outer is not None:
            return _Passed(self._outer, tensor)
        # The tensor itself may own the node that owns what is returned here.
        return (tensor if node is None else tensor.detach()), tensor._version

    def unpack(self, packed: Any) -> Tensor:
        if type(packed) is _Slot:
            return packed.recipe.read(packed)
        if type(packed) is _Passed:
            return packed.read()
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                f"Block {self.name!r}: a tensor of shape {tuple(tensor.shape)} that the backward needs is at "
                f"version {tensor._version}; it was saved at version {version}. It has been modified by an "
                f"inplace operation since. Write that operation out of place."
            )
        kept: Tensor = tensor
        return kept

    def _recipe(self, tensor: Tensor, node: Any) -> _Recipe | None:
        output, name = tensor.output_nr, type(node).__name__
        while name in VIEWS:
            node, next_output = node.next_functions[0]
            if node is None or output:
                return None
            output, name = next_output, type(node).__name__
        if name not in CHEAP:
            return None
        version = tensor._version
        if output or tensor.layout is not torch.strided or version > (name in MAY_BE_IN_PLACE):
            return None
        recipes, key = self.selection.recipes, tensor.untyped_storage()._cdata
        recipe = recipes.get(key)
        if recipe is not None:
            return recipe
        again = rebuild(node, tensor.dtype, self._eps_of)
        if again is None:
            return None
        recipe = recipes[key] = _Recipe(self, name, again, tensor)
        return recipe

    def _eps_of(self, node: Any) -> float | None:
        if not self._may_read:
            return self.selection.candidates[0] if len(self.selection.candidates) == 1 else None
        _RUNNING.depth += 1
        try:
            with torch.no_grad():
                return self.selection.eps_of(node)
        finally:
            _RUNNING.depth -= 1


@dataclasses.dataclass(frozen=True)
class SelectiveRegion:
    """A part of the model that users know as `name`."""

    name: str
    fn: Callable[..., Any]
    selection: Selection
    checks: bool  # whether what is computed again is compared with what was dropped


def run_selective(region: SelectiveRegion, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the region without keeping what its cheap operations give. Called while gradients are on."""
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        raise transform_error(region.name)
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    block = None if outer is None else getattr(outer[0], "__self__", None)
    if isinstance(block, _Block) and block.selection is region.selection:
        return region.fn(*args, **kwargs)  # a block in a selective block: its hooks see everything
    with _Block(region, outer).hooks():
        return region.fn(*args, **kwargs)
