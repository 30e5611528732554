"""Functions of each element: every rank computes its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from mlsys_engine.tensor_parallel.runtime.rules.fitting import fitted
from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor, cut_tensors, mapped

_NAMES = [
    "abs", "absolute", "neg", "negative", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt",
    "rsqrt", "square", "reciprocal", "sigmoid", "tanh", "relu", "relu6", "gelu", "silu", "mish", "elu",
    "selu", "celu", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "softplus", "softsign",
    "tanhshrink", "logsigmoid", "erf", "erfc", "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan",
    "ceil", "floor", "round", "trunc", "frac", "sign", "clamp", "clamp_min", "clamp_max", "clip",
    "nan_to_num", "isnan", "isinf", "isfinite", "logical_not", "bitwise_not", "invert", "add", "radd",
    "sub", "rsub", "subtract", "mul", "rmul", "multiply", "div", "rdiv", "divide", "truediv", "rtruediv",
    "floordiv", "rfloordiv", "floor_divide", "true_divide", "pow", "rpow", "remainder", "fmod", "mod",
    "atan2", "maximum", "minimum", "fmax", "fmin", "lerp", "addcmul", "addcdiv", "eq", "ne", "lt", "le",
    "gt", "ge", "not_equal", "less", "greater", "less_equal", "greater_equal", "logical_and", "logical_or",
    "logical_xor", "and", "or", "xor", "rand", "ror", "bitwise_and", "bitwise_or", "where", "masked_fill",
    "pos", "positive", "float", "double", "half", "bfloat16", "int", "long", "bool", "detach", "clone",
    "contiguous", "threshold", ]  # fmt: skip


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, list | tuple):
        return [tensor for item in tree for tensor in _tensors(item)]
    if isinstance(tree, dict):
        return _tensors(list(tree.values()))
    return []


def each_element(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Arguments are broadcast together; the longest cut one says how the others are cut."""
    cut = cut_tensors(args, dict(kwargs))
    first = args[0]
    name = getattr(func, "__name__", "")
    changes = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    changes = (changes and name not in ("__invert__",)) or bool(kwargs.get("inplace"))
    if changes and not isinstance(first, CutTensor):
        return NotImplemented  # a whole value takes whole ones
    lead = first if changes else max(cut, key=lambda value: (value.numel(), value is first))
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in _tensors([args, dict(kwargs)])))
    if shape[lead.from_end] != lead.shape[lead.cut_dim] or "out" in kwargs:
        return NotImplemented

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        return fitted(context, tensor, lead)

    local = func(*mapped(tuple(args), fit), **mapped(dict(kwargs), fit))
    if changes:
        return first
    return lead.with_local(local, shape, lead.from_end + len(shape))


def _converted(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`to`, `type_as`: the other tensor is asked for its type alone."""
    value, *others = args
    if not isinstance(value, CutTensor):
        others = [other.local if isinstance(other, CutTensor) else other for other in others]
        return func(value, *others, **kwargs)
    others = [other.local if isinstance(other, CutTensor) else other for other in others]
    local = func(value.local, *others, **kwargs)
    if not isinstance(local, torch.Tensor):
        return local  # type() without arguments
    return value if local is value.local else value.with_local(local, value.shape, value.cut_dim)


def _dropout(
    context: Context,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Drops what one process would drop: the random numbers are those of the whole value."""
    value, p, training, inplace = _dropout_arguments(func, *args, **kwargs)
    if not training or p == 0.0:
        return value
    with torch.no_grad():
        mask = functional.dropout(torch.ones(value.shape, dtype=value.dtype, device=value.device), p)
        mask = value.sharding.take(mask, context.rank)
    local = value.local.mul_(mask) if inplace else value.local * mask
    return value if inplace else value.with_local(local, value.shape, value.cut_dim)


def _dropout_arguments(  # noqa: PLR0917 (torch's own signature)
    func: Any, input: CutTensor, p: float = 0.5, training: bool | None = None, inplace: bool = False,
    train: bool | None = None,
) -> tuple[CutTensor, float, bool, bool]:  # fmt: skip
    given = training if training is not None else train
    return input, p, True if given is None else given, inplace or func.__name__ == "dropout_"


def _like(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A new whole value, for which another is asked for its shape alone."""
    value, *rest = args
    if not isinstance(value, CutTensor):
        return NotImplemented
    shown = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return func(shown, *rest, **{"device": value.device, **kwargs})


def _new(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A new whole value of another's type."""
    value, *rest = args
    if not isinstance(value, CutTensor):
        return NotImplemented
    return func(value.local, *mapped(tuple(rest), context.whole), **mapped(dict(kwargs), context.whole))


_LIKE = ["zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"]
_NEW = ["new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"]

RULES = {
    **dict.fromkeys(_NAMES, each_element),
    **dict.fromkeys(_LIKE, _like),
    **dict.fromkeys(_NEW, _new),
    **dict.fromkeys(("to", "type_as", "type"), _converted),
    "dropout": _dropout,
}
