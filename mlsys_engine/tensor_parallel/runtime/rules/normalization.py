"""Functions along some dims: sums, means, softmax, norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor


def _reduced(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """sum and mean, over the cut dim too; the others of their kind where it stays."""
    value = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    keepdim = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    if len(args) > 3 or not isinstance(value, CutTensor) or isinstance(dim, torch.dtype):
        return NotImplemented
    given = range(value.dim()) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    dims = sorted({each % value.dim() for each in given})
    options = {key: each for key, each in kwargs.items() if key in ("dtype", "correction", "unbiased")}
    if set(kwargs) - {"input", "dim", "keepdim", *options}:
        return NotImplemented
    name = func.__name__
    if value.cut_dim in dims:
        if name not in ("sum", "mean"):
            return NotImplemented
        total = context.left(value.local.sum(dims, keepdim=keepdim, **options))
        return total if name == "sum" else total / math.prod(value.shape[each] for each in dims)
    local = getattr(torch, name)(value.local, dim=dims, keepdim=keepdim, **options)
    shape = [
        1 if place in dims else length
        for place, length in enumerate(value.shape)
        if keepdim or place not in dims
    ]
    gone = 0 if keepdim else sum(each < value.cut_dim for each in dims)
    return value.with_local(local, shape, value.cut_dim - gone)


def _along(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Functions along one dim that keep the shape."""
    value = args[0] if args else kwargs["input"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(dim, int) or dim % value.dim() == value.cut_dim:
        return NotImplemented
    rest = {key: each for key, each in kwargs.items() if key != "input"}
    return value.with_local(func(value.local, *args[1:], **rest), value.shape, value.cut_dim)


def _normalized(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """layer_norm, rms_norm: weights are whole, and each rank has a term of their gradients."""
    value = args[0] if args else kwargs["input"]
    lengths = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    if not isinstance(value, CutTensor) or value.cut_dim >= value.dim() - len(lengths):
        return NotImplemented

    def own(each: Any) -> Any:
        return context.entering(each) if isinstance(each, torch.Tensor) else each

    rest = {key: own(each) for key, each in kwargs.items() if key != "input"}
    local = func(value.local, *(own(each) for each in args[1:]), **rest)
    return value.with_local(local, value.shape, value.cut_dim)


RULES = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "var", "std"), _reduced),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), _along),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalized),
}
