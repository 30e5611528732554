"""Runs a block so that less stays of what autograd saves in it, without running the block again.

A pack hook looks at every tensor that is saved. The output of a norm, an activation function, a product or a
cast is dropped when `cheap_operations` can compute it again from what autograd keeps anyway (Korthikanti et
al. 2022 drop whole parts of a block; here single tensors go). Masks become bits. Of what is left, the option
may have it packed in a lossy form, or moved out of the device's memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mlsys_engine.activation.cheap_operations import CHEAP, MAY_BE_IN_PLACE, VIEWS, layer_norm, rebuild
from mlsys_engine.activation.offload import Offloader
from mlsys_engine.activation.options import OFFLOAD, Option
from mlsys_engine.activation.recompute import transform_error
from mlsys_engine.activation.slots import RUNNING, Hooks, Passed, Recipe, Slot
from mlsys_engine.activation.stored import store, store_mask, takes
from mlsys_engine.memory import SavedActivationMeter, current_observer, is_parameter

_LEAST_BYTES = 4096  # below, a slot costs more than it spares
_STATISTICS_PART = 8  # a row of activations has more elements than this for each of its statistics


class SavingContext:
    """What the saving blocks of a model share: recipes that live, and the eps of its LayerNorms.

    A recipe is found by its storage's address; its entry goes before the address is given away.
    """

    def __init__(self, candidates: tuple[float, ...]) -> None:
        self.candidates = candidates
        self.offloader = Offloader()
        self.recipes: weakref.WeakValueDictionary[int, Recipe] = weakref.WeakValueDictionary()
        self._eps: dict[int, tuple[weakref.ref[Tensor], float | None]] = {}

    @classmethod
    def of(cls, model: nn.Module) -> SavingContext:
        names = ("eps", "variance_epsilon")
        found = (getattr(module, name, None) for module in model.modules() for name in names)
        return cls(tuple(dict.fromkeys(eps for eps in found if isinstance(eps, float))))

    def __reduce__(self) -> tuple[type[SavingContext], tuple[tuple[float, ...]]]:
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


class Saving:
    """One block's option: runs the block's forward under it. Copies and pickles with the model."""

    def __init__(self, block: nn.Module, name: str, option: Option, context: SavingContext) -> None:
        self.name, self.option, self.context = name, option, context
        # Which of a call's tensors, by number and shape, have turned out to be no masks: not looked at again.
        self.no_masks: set[tuple[int, torch.Size]] = set()
        self._block, self._has_checked = block, False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "eps_by_weight"}

    @cached_property
    def eps_by_weight(self) -> dict[int, float]:
        """The eps of the block's LayerNorms, by the identity of their weights."""
        norms = (module for module in self._block.modules() if isinstance(module, nn.LayerNorm))
        return {id(norm.weight): norm.eps for norm in norms if norm.weight is not None}

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `fn`, the block's forward, keeping less for its backward. Called while gradients are on."""
        if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
            raise transform_error(self.name)
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        around = None if outer is None else getattr(outer[0], "__self__", None)
        if isinstance(around, _BlockCall) and around.saving.context is self.context:
            return fn(*args, **kwargs)  # a block in such a block: its hooks see everything
        self.context.offloader.begin_block()
        checks = self._block.training and not self._has_checked
        call = _BlockCall(self, outer, checks and not self.option.is_lossy, args, kwargs)
        call.inputs = partial(_inputs, self._block, args, kwargs)
        try:
            with torch.autograd.graph.saved_tensors_hooks(call.pack, call.unpack):
                result = fn(*args, **kwargs)
        finally:
            call.inputs = None  # the graph owns the hooks, and would keep the inputs
        self._has_checked |= checks
        return result


class _BlockCall:
    """The hooks of one call of a block."""

    def __init__(
        self, saving: Saving, outer: Hooks | None, checks: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.saving, self.name, self.checks = saving, saving.name, checks
        self.observe = current_observer()
        self._outer = outer
        # A meter only counts. Others, such as a recompute frame, decide what becomes of what they are given.
        # The frame keeps the block's inputs itself, and they have other nodes when it runs the block again.
        self._is_alone = outer is None or outer[1] is SavedActivationMeter.read_saved
        self._passed_inputs: set[int] = set() if self._is_alone else _storages(_tensors(args, kwargs))
        self.inputs: Callable[[], tuple[set[int], int]] | None = None
        self._inputs: tuple[set[int], int] | None = None
        self._num_asked = 0  # tensors that may be stored in another form

    def pack(self, tensor: Tensor) -> Any:
        node = tensor.grad_fn
        if tensor.nbytes >= _LEAST_BYTES and type(tensor) is Tensor and tensor.layout is torch.strided:
            recipe = self._recipe(tensor, node)
            if recipe is not None:
                return Slot(recipe, tensor)
        if self._outer is not None:
            return Passed(self._outer, tensor)
        # The tensor itself may own the node that owns what is returned here.
        return (tensor if node is None else tensor.detach()), tensor._version

    def unpack(self, packed: Any) -> Tensor:
        if type(packed) is Slot:
            return packed.recipe.read(packed)
        if type(packed) is Passed:
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

    def _recipe(self, tensor: Tensor, node: Any) -> Recipe | None:
        recipes, key = self.saving.context.recipes, tensor.untyped_storage()._cdata
        if not self._is_alone and key in self._passed_inputs:
            return None
        recipe = recipes.get(key)
        if recipe is not None and recipe.is_of(tensor):
            return recipe
        recipe = None
        if node is not None and self.saving.option.drops_cheap:
            recipe = self._cheap(tensor, node)
        if recipe is None:
            recipe = self._stored(tensor, node)
        if recipe is not None:
            recipes[key] = recipe
        return recipe

    def _cheap(self, tensor: Tensor, node: Any) -> Recipe | None:
        output, name = tensor.output_nr, type(node).__name__
        while name in VIEWS:
            node, next_output = node.next_functions[0]
            if node is None or output:
                return None
            output, name = next_output, type(node).__name__
        if name not in CHEAP or output or tensor._version > (name in MAY_BE_IN_PLACE):
            return None
        again = rebuild(node, tensor.dtype, self._eps_of)
        if again is None:
            return None
        operation = name.removesuffix("Backward0")
        how = f"its operation {operation} was computed again from what autograd had saved"
        return Recipe(self, how, again, tensor, self.checks)

    def _stored(self, tensor: Tensor, node: Any) -> Recipe | None:
        """Of what is nobody else's: masks as bits, the rest in the option's form; None keeps it as it is."""
        form = self.saving.option.form
        self._num_asked += 1
        place = (self._num_asked, tensor.shape)
        may_be_mask = node is None and not tensor.requires_grad and place not in self.saving.no_masks
        if not may_be_mask and not (form == OFFLOAD or (form is not None and takes(form, tensor.dtype))):
            return None
        numel = tensor.untyped_storage().nbytes() // tensor.element_size()
        owner = tensor if tensor._base is None else tensor._base
        if owner.numel() != numel or owner.dtype is not tensor.dtype:  # parts of the storage may be garbage
            return None
        if is_parameter(tensor) or self._is_plain(tensor):
            return None
        flat = tensor.detach().as_strided((numel,), (1,), 0)
        outer = None if self._is_alone else self._outer
        again = None
        if may_be_mask:
            again = store_mask(flat, outer, self.observe)
            if again is None:
                self.saving.no_masks.add(place)
        if again is None and form == OFFLOAD and self._is_alone:
            again = self.saving.context.offloader.put(self.name, flat, self.observe).read
        elif again is None and form is not None and takes(form, tensor.dtype):
            again = store(flat, form, outer, self.observe)
        if again is None:
            return None
        return Recipe(self, "it read what had been packed", again, tensor, self.checks)

    def _is_plain(self, tensor: Tensor) -> bool:
        """Whether somebody else keeps the tensor anyway, or it holds statistics (a norm's deviations, the
        logsumexp of attention): few numbers, of which the backward wants every bit."""
        if tensor.requires_grad:
            return False
        if self._inputs is None:
            assert self.inputs is not None
            self._inputs = self.inputs()
        held, largest = self._inputs
        return tensor.untyped_storage()._cdata in held or tensor.numel() * _STATISTICS_PART < largest

    def _eps_of(self, node: Any) -> float | None:
        context = self.saving.context
        # What hooks of others have packed is read in the backward alone, what is moved away would come back,
        # and lossy values show no eps: the LayerNorm that owns the weight tells it.
        if not self._is_alone or self.saving.option.form is not None:
            return self.saving.eps_by_weight.get(id(getattr(node.next_functions[1][0], "variable", None)))
        RUNNING.depth += 1
        try:
            with torch.no_grad():
                return context.eps_of(node)
        finally:
            RUNNING.depth -= 1


def _inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[set[int], int]:
    """The storages of buffers and inputs without gradients, which stay; elements of the largest input."""
    tensors = _tensors(args, kwargs)
    plain = [tensor for tensor in tensors if not tensor.requires_grad]
    held = _storages([*plain, *block.buffers()])
    return held, max((tensor.numel() for tensor in tensors if tensor.requires_grad), default=0)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
