"""A value of which every rank has a part, as the model's code sees it: a tensor of the whole's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from mlsys_engine.errors import InternalError
from mlsys_engine.tensor_parallel.sharding import Sharding


class Context(Protocol):
    """What decides about functions of cut values (`mode.TensorParallel`)."""

    @property
    def rank(self) -> int:
        """This rank's place in the parts of a Sharding."""

    def handle(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of a torch function some of whose arguments are cut."""

    def whole(self, value: Any) -> Any:
        """A cut tensor gathered; anything else as it is. Called by all ranks together."""

    def entered(self, tensor: torch.Tensor) -> torch.Tensor:
        """A whole tensor, whose gradient will be the sum over ranks."""

    def left(self, term: torch.Tensor) -> torch.Tensor:
        """The sum of a term over ranks."""

    def entering(self, value: torch.Tensor) -> torch.Tensor:
        """A value, whole or cut, as the whole that `entered` gives."""

    def taken(self, whole: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        """This rank's part of a whole tensor."""

    def summed(self, term: torch.Tensor) -> torch.Tensor:
        """The sum of activations (..., tokens, features) over ranks: whole, or cut along the tokens."""

    def merged(self, dims: Sequence[int]) -> None:
        """Tells that a value's leading `dims` have become the rows of a matrix."""


class CutTensor(torch.Tensor):
    """This rank's part of a value. Its metadata are the whole's; it has no storage, and `local` has the data
    and the gradient's graph."""

    local: torch.Tensor
    sharding: Sharding
    context: Context

    @staticmethod
    def __new__(
        cls, local: torch.Tensor, shape: Sequence[int], sharding: Sharding, context: Context
    ) -> CutTensor:
        if sharding.local_shape(shape, context.rank) != tuple(local.shape):
            raise InternalError(f"a part {tuple(local.shape)} of {tuple(shape)} cut as {sharding}")
        made: CutTensor = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=local.dtype, device=local.device, requires_grad=False
        )
        made.local, made.sharding, made.context = local, sharding, context
        return made

    @property
    def cut_dim(self) -> int:
        return self.sharding.dim

    @property
    def from_end(self) -> int:
        """The cut dim, counted from the last: -1 is the last."""
        return self.sharding.dim - self.dim()

    def with_local(self, local: torch.Tensor, shape: Sequence[int], dim: int) -> CutTensor:
        """Another value that is cut as this one, at its dim `dim`."""
        return CutTensor(local, shape, Sharding(dim=dim, parts=self.sharding.parts), self.context)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CutTensor({tuple(self.shape)}, dim {self.cut_dim}, here {tuple(self.local.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__repr__:
            with torch._C.DisableTorchFunctionSubclass():
                return cls.__repr__(args[0])
        return _context_of(args, kwargs or {}).handle(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise InternalError(
            f"{func} was given a value that is cut over ranks by code that torch functions do not show (an "
            "autograd.Function of its own, or compiled code)"
        )


def cut_tensors(*trees: Any) -> list[CutTensor]:
    """Those among arguments and in lists of them."""
    found: list[CutTensor] = []
    for tree in trees:
        if isinstance(tree, CutTensor):
            found.append(tree)
        elif isinstance(tree, list | tuple):
            found += cut_tensors(*tree)
        elif isinstance(tree, dict):
            found += cut_tensors(*tree.values())
    return found


def mapped(tree: Any, change: Any) -> Any:
    """The arguments with every tensor changed, also in lists, tuples and mappings."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(item, change) for item in tree))
    if isinstance(tree, list | tuple) and not isinstance(tree, torch.Size):
        return type(tree)(mapped(item, change) for item in tree)
    if type(tree) is dict:
        return {key: mapped(item, change) for key, item in tree.items()}
    return tree


def _context_of(*trees: Any) -> Context:
    found = cut_tensors(*trees)
    if not found:
        raise InternalError("a function of cut values without any")
    return found[0].context
