"""Watches the torch functions of a model's own forward, and runs each on what this rank has of its arguments.

A function with a rule keeps its values cut; any other gets them whole, so a missing rule costs time and not
numbers. The rules are told by the names of functions, since `x + y`, `x.add(y)` and `torch.add(x, y)` are
three functions of one name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mlsys_engine.errors import ConfigError
from mlsys_engine.tensor_parallel.runtime.backward import BACKWARDS
from mlsys_engine.tensor_parallel.runtime.collectives import (
    enter,
    gather,
    gather_entering,
    leave,
    leave_cut,
    take,
)
from mlsys_engine.tensor_parallel.runtime.kept import Gathered, parts_kept
from mlsys_engine.tensor_parallel.runtime.recent import Recent
from mlsys_engine.tensor_parallel.runtime.rules import RULES
from mlsys_engine.tensor_parallel.runtime.rules.shapes import MOST_BLOCKS
from mlsys_engine.tensor_parallel.runtime.values import CutTensor, cut_tensors, mapped
from mlsys_engine.tensor_parallel.sharding import Sharding, even_sharding

# Of a value's metadata, which are the whole's.
_METADATA = frozenset([
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size",
    "is_floating_point", "is_complex", "get_device", "__len__", "__hash__", "__format__", "storage_offset",
    "is_signed",
])  # fmt: skip
_OWN = frozenset(("grad", "data", "requires_grad", "grad_fn", "is_leaf", "_backward_hooks", "retains_grad"))


class TensorParallel(TorchFunctionMode):
    """One model whose parameters named in `shardings` hold this rank's parts, of values of the `shapes`.

    While it is `active()`, the model's forward, its loss and what is recomputed in backward see those
    parameters with their whole shapes. All ranks of `group` run the same functions in the same order.

    With `sequence_parallel` the activations between products are cut along their tokens: a product's sum
    over ranks arrives in parts, and norms, dropout and residual sums keep them until the next product.
    """

    def __init__(
        self,
        model: nn.Module,
        shardings: Mapping[str, Sharding],
        shapes: Mapping[str, Sequence[int]],
        group: dist.ProcessGroup,
        *,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self._model, self._shardings, self._shapes = model, dict(shardings), dict(shapes)
        self._group, self._sequence_parallel = group, sequence_parallel
        self._rows: dict[int, tuple[int, ...]] = {}  # of matrices -> the dims that were merged to these
        self.rank = dist.get_rank(group)
        self._cut: dict[int, CutTensor] = {}  # by the id of a parameter that is alive while this is active
        self._entered, self._gathered = Recent(), Recent()
        self._handles = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Forward, loss and backward run inside."""
        try:
            with self._keeping(), self.seen():
                yield
        finally:
            self._cut, self._rows = {}, {}
            self._entered.forget()
            self._gathered.forget()

    def _keeping(self) -> AbstractContextManager[None]:
        if not self._sequence_parallel:
            return nullcontext()
        return parts_kept(
            lambda: [(each.result, each.kept) for each in self._entered.crossed if each.kept is not None]
        )

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Inside, functions see the parameters that the model has now, before modes entered earlier do."""
        with torch._C.DisableTorchFunction():
            for name, parameter in self._model.named_parameters():
                if name in self._shardings and id(parameter) not in self._cut:
                    shape, sharding = self._shapes[name], self._shardings[name]
                    self._cut[id(parameter)] = CutTensor(parameter, shape, sharding, self)
        with self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._handles:
            return func(*args, **kwargs)  # on parts, for a rule of this mode further up the stack
        if func in BACKWARDS:
            args, kwargs = mapped(tuple(args), self.whole), mapped(dict(kwargs), self.whole)
            with self:
                return BACKWARDS[func](*args, **kwargs)
        if not self._concerns(args) and not (kwargs and self._concerns(kwargs.values())):
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__") and not isinstance(
            args[0], CutTensor
        ):
            name = func.__self__.__name__
            if name in _OWN or func.__name__ != "__get__":
                return func(*args, **kwargs)
        return self.handle(func, self._seen(args), self._seen(kwargs))

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The function's result for arguments some of which are cut."""
        name, changes = _name(func)
        if name == "__get__":
            return self._attribute(func, args[0])
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = RULES.get(name)
        if rule is not None:
            before, self._handles = self._handles, True
            try:
                result = rule(self, func, args, kwargs)
            finally:
                self._handles = before
            if result is not NotImplemented:
                return result
        if (changes and args and isinstance(args[0], CutTensor)) or isinstance(kwargs.get("out"), CutTensor):
            raise _refused(name, args)
        whole_args, whole_kwargs = mapped(tuple(args), self.whole), mapped(dict(kwargs), self.whole)
        return func(*whole_args, **whole_kwargs)

    def whole(self, value: Any) -> Any:
        """A cut tensor gathered; anything else as it is. Called by all ranks together."""
        if not isinstance(value, CutTensor):
            return value
        return self._gathered.get(
            value, lambda: gather(value.local, value.sharding, self._group), kept=lambda: None
        )

    def gathered(self, tree: Any) -> Any:
        """A tree of values without cut ones."""
        return tree_map(self.whole, tree) if any(_has_cut(leaf) for leaf in _leaves(tree)) else tree

    def entering(self, value: torch.Tensor) -> torch.Tensor:
        """A value, whole or cut, as the whole that `entered` gives."""
        if not isinstance(value, CutTensor):
            return self.entered(value)
        part, sharding = value.local, value.sharding
        return self._entered.get(
            value,
            lambda: gather_entering(part, sharding, self._group),
            kept=lambda: Gathered(part.detach(), sharding, self._group),
        )

    def entered(self, tensor: torch.Tensor) -> torch.Tensor:
        """A whole tensor, whose gradient will be the sum over ranks: one sum for the next few readers of it,
        as the query, key and value projections of one input are."""
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        return self._entered.get(tensor, lambda: enter(tensor, self._group), kept=lambda: None)

    def taken(self, whole: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        return take(whole, sharding, self._group)

    def left(self, term: torch.Tensor) -> torch.Tensor:
        return leave(term, self._group)

    def summed(self, term: torch.Tensor) -> torch.Tensor:
        """The sum of activations (..., tokens, features) over ranks, cut along the tokens where these are."""
        sharding = self._along_tokens(tuple(term.shape)) if self._sequence_parallel else None
        if sharding is None:
            return self.left(term)
        return CutTensor(leave_cut(term, sharding, self._group), term.shape, sharding, self)

    def merged(self, dims: Sequence[int]) -> None:
        """Tells that a value's leading `dims` have become the rows of a matrix; the last are tokens."""
        self._rows[math.prod(dims)] = tuple(dims)

    def _along_tokens(self, shape: tuple[int, ...]) -> Sharding | None:
        size = self._group.size()
        if len(shape) > 2:
            return even_sharding(shape, len(shape) - 2, size) if shape[-2] >= size else None
        *blocks, tokens = self._rows.get(shape[0], (0,))
        if len(shape) < 2 or tokens < size or math.prod(blocks) > MOST_BLOCKS:
            return None
        return even_sharding(shape, 0, size, (tokens,) * math.prod(blocks))

    def maximum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of each element over ranks; without a gradient."""
        result = tensor.detach().clone()
        dist.all_reduce(result, dist.ReduceOp.MAX, group=self._group)
        return result

    def _attribute(self, func: Any, value: CutTensor) -> Any:
        name = func.__self__.__name__
        if name in ("mT", "T") and (name == "mT" or value.dim() == 2):
            return self.handle(torch.Tensor.transpose, (value, -1, -2), {})
        if name in ("T", "H", "mH", "real", "imag"):
            return func(self.whole(value))
        if name == "data":
            return value.with_local(value.local.detach(), value.shape, value.cut_dim)
        if name in ("requires_grad", "grad_fn", "is_leaf"):
            return getattr(value.local, name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(value)

    def _concerns(self, values: Any) -> bool:
        for value in values:
            if isinstance(value, torch.Tensor):
                if id(value) in self._cut or isinstance(value, CutTensor):
                    return True
            elif isinstance(value, list | tuple) and value and self._concerns(value):
                return True
        return False

    def _seen(self, tree: Any) -> Any:
        return mapped(tree, lambda tensor: self._cut.get(id(tensor), tensor))


def _name(func: Any) -> tuple[str, bool]:
    """A function's name without marks of how it was called, and whether it changes its first argument."""
    name: str = getattr(func, "__name__", str(func))
    if name in ("__get__", "__len__", "__hash__", "__format__"):
        return name, False
    if name == "__setitem__":
        return "setitem", True
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name.startswith("i") and name[1:] in _IN_PLACE:
            return name[1:], True
        return name, False
    if name.endswith("_") and not name.endswith("__"):
        return name[:-1], True
    return name, False


_IN_PLACE = frozenset([
    "add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor", "mod", "matmul",
])  # fmt: skip


def _leaves(tree: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(tree))


def _has_cut(leaf: Any) -> bool:
    return bool(cut_tensors(leaf))


def _refused(name: str, args: Sequence[Any]) -> ConfigError:
    return ConfigError(
        f"{name}_ changes a value of shape {list(args[0].shape)} that is cut over ranks.",
        "Values are changed in place only where the change is the same function of each element.",
        f"Write the model with {name}, or leave the module whose values these are out: plan={{...}}.",
    )
