"""Functions that move dims or regroup them: the cut moves along."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlsys_engine.tensor_parallel.runtime.rules.fitting import fitted
from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor
from mlsys_engine.tensor_parallel.sharding import Sharding

Intervals = tuple[tuple[int, int], ...]
MOST_BLOCKS = 4096  # of a regrouped cut; beyond, a value is gathered


def regrouped(value: CutTensor, shape: Sequence[int]) -> Sharding | None:
    """The cut after a view as `shape`; None where no dim of that shape is cut alike on all of it."""
    old, dim = tuple(value.shape), value.cut_dim
    if not math.prod(old):
        return None
    for (a, b), (c, d) in _groups(old, tuple(shape)):
        if a <= dim < b:
            return _in_group(old, (a, b), dim, tuple(shape), news=(c, d), parts=value.sharding.parts)
    return None


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The shortest runs of dims of both shapes with as many elements."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, c = i, j
        have = old[i] if i < len(old) else 1
        want = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while have != want:
            if have < want:
                have, i = have * old[i], i + 1
            else:
                want, j = want * new[j], j + 1
        groups.append(((a, i), (c, j)))
    return groups


def _in_group(
    old: tuple[int, ...],
    olds: tuple[int, int],
    dim: int,
    new: tuple[int, ...],
    *,
    news: tuple[int, int],
    parts: tuple[Intervals, ...],
) -> Sharding | None:
    """The cut of the dim `dim` of a run of dims `olds`, seen as the run `news` of as many elements."""
    outer, inner = math.prod(old[olds[0] : dim]), math.prod(old[dim + 1 : olds[1]])
    if outer * len(parts[0]) > MOST_BLOCKS:
        return None
    length = old[dim]
    flat = [
        _merged([
            ((block * length + start) * inner, (block * length + stop) * inner)
            for block in range(outer)
            for start, stop in intervals
        ])
        for intervals in parts
    ]  # fmt: skip
    for place in range(*news):
        blocks, step = math.prod(new[news[0] : place]), math.prod(new[place + 1 : news[1]])
        if new[place] == 1 or blocks > MOST_BLOCKS:
            continue
        found = [_in_blocks(intervals, blocks, new[place], step) for intervals in flat]
        if all(each is not None for each in found):
            return Sharding(dim=place, parts=tuple(each for each in found if each is not None))
    return None


def _merged(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in intervals:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _in_blocks(intervals: list[tuple[int, int]], blocks: int, length: int, step: int) -> Intervals | None:
    """The intervals of one dim that make up `intervals` of its view; None where blocks of it differ."""
    size, found = length * step, None
    for block in range(blocks):
        low, high = block * size, (block + 1) * size
        own = tuple(
            ((max(start, low) - low), (min(stop, high) - low))
            for start, stop in intervals
            if start < high and stop > low
        )
        if not own or any(edge % step for pair in own for edge in pair):
            return None
        own = tuple((start // step, stop // step) for start, stop in own)
        if found is not None and own != found:
            return None
        found = own
    return found


def viewed(value: CutTensor, shape: Sequence[int]) -> Any:
    """The value as `shape`, which may have one -1."""
    known = math.prod(length for length in shape if length != -1)
    if -1 in shape and not known:
        return NotImplemented
    shape = tuple(value.numel() // known if length == -1 else int(length) for length in shape)
    if math.prod(shape) != value.numel():
        return NotImplemented  # torch tells what is wrong
    if len(shape) == 2 and value.dim() > 2 and shape[-1] == value.shape[-1]:
        value.context.merged(value.shape[:-1])
    found = regrouped(value, shape)
    if found is None:
        return NotImplemented
    local = value.local.reshape(found.local_shape(shape, value.context.rank))
    return CutTensor(local, shape, found, value.context)


def _listed(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], list | tuple) else tuple(args)


def _view(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    sizes = _listed(args[1:]) if len(args) > 1 else _listed((kwargs.get("size", kwargs.get("shape")),))
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        return NotImplemented
    return viewed(args[0], sizes)


def _view_as(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return viewed(args[0], args[1].shape) if isinstance(args[0], CutTensor) else NotImplemented


def _flatten(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, start, end = _with_defaults(args, kwargs, ("start_dim", 0), ("end_dim", -1))
    start, end = start % value.dim(), end % value.dim()
    lengths = tuple(value.shape)
    return viewed(value, (*lengths[:start], math.prod(lengths[start : end + 1]), *lengths[end + 1 :]))


def _unflatten(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, dim, sizes = _with_defaults(args, kwargs, ("dim", 0), ("sizes", ()))
    dim, lengths = dim % value.dim(), tuple(value.shape)
    sizes = tuple(sizes)
    if -1 in sizes:
        rest = lengths[dim] // math.prod(size for size in sizes if size != -1)
        sizes = tuple(rest if size == -1 else size for size in sizes)
    return viewed(value, (*lengths[:dim], *sizes, *lengths[dim + 1 :]))


def _with_defaults(args: Sequence[Any], kwargs: Mapping[str, Any], *names: tuple[str, Any]) -> list[Any]:
    """The first argument and the named ones behind it."""
    found = [args[0] if args else kwargs["input"]]
    for place, (name, default) in enumerate(names, 1):
        found.append(args[place] if place < len(args) else kwargs.get(name, default))
    return found


def _transpose(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, first, second = _with_defaults(args, kwargs, ("dim0", 0), ("dim1", 1))
    order = list(range(value.dim()))
    first, second = first % value.dim(), second % value.dim()
    order[first], order[second] = order[second], order[first]
    return _permuted(value, order)


def _t(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _permuted(args[0], list(reversed(range(args[0].dim()))))


def _permute(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    dims = _listed(args[1:]) if len(args) > 1 else tuple(kwargs["dims"])
    return _permuted(args[0], [dim % args[0].dim() for dim in dims])


def _permuted(value: CutTensor, order: list[int]) -> CutTensor:
    shape = [value.shape[dim] for dim in order]
    return value.with_local(value.local.permute(order), shape, order.index(value.cut_dim))


def _unsqueeze(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, dim = _with_defaults(args, kwargs, ("dim", 0))
    dim %= value.dim() + 1
    shape = list(value.shape)
    shape.insert(dim, 1)
    return value.with_local(value.local.unsqueeze(dim), shape, value.cut_dim + (dim <= value.cut_dim))


def _squeeze(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, dim = _with_defaults(args, kwargs, ("dim", None))
    dims = range(value.dim()) if dim is None else (dim,) if isinstance(dim, int) else dim
    gone = {each % value.dim() for each in dims if value.shape[each] == 1}
    return viewed(value, [length for place, length in enumerate(value.shape) if place not in gone])


def _expand(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = args[0]
    if not isinstance(value, CutTensor):
        return NotImplemented
    sizes = (
        tuple(args[1].shape) if func.__name__ == "expand_as" else _listed(args[1:]) or tuple(kwargs["size"])
    )
    extra = len(sizes) - value.dim()
    shape = tuple(
        value.shape[place - extra] if length == -1 else int(length) for place, length in enumerate(sizes)
    )
    dim = value.cut_dim + extra
    if shape[dim] != value.shape[value.cut_dim]:
        return NotImplemented
    here = Sharding(dim=dim, parts=value.sharding.parts).local_shape(shape, context.rank)
    return value.with_local(value.local.expand(here), shape, dim)


def _repeat_interleave(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, repeats, dim = _with_defaults(args, kwargs, ("repeats", None), ("dim", None))
    if not isinstance(value, CutTensor) or not isinstance(repeats, int) or dim is None:
        return NotImplemented
    dim %= value.dim()
    shape = [length * (repeats if place == dim else 1) for place, length in enumerate(value.shape)]
    local = value.local.repeat_interleave(repeats, dim)
    if dim != value.cut_dim:
        return value.with_local(local, shape, value.cut_dim)
    parts = tuple(tuple((a * repeats, b * repeats) for a, b in part) for part in value.sharding.parts)
    return CutTensor(local, shape, Sharding(dim=dim, parts=parts), context)


def _cat(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors, dim = (
        _with_defaults(args, kwargs, ("dim", 0)) if args else (kwargs["tensors"], kwargs.get("dim", 0))
    )
    lead = next(tensor for tensor in tensors if isinstance(tensor, CutTensor))
    stacks = func.__name__ == "stack"
    dim %= lead.dim() + stacks
    if not stacks and dim == lead.cut_dim:
        return NotImplemented
    if any(tensor.dim() != lead.dim() for tensor in tensors):
        return NotImplemented
    local = func([fitted(context, tensor, lead) for tensor in tensors], dim)
    shape = list(lead.shape)
    if stacks:
        shape.insert(dim, len(tensors))
    else:
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return lead.with_local(local, shape, lead.cut_dim + (stacks and dim <= lead.cut_dim))


def _pad(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, pads = _with_defaults(args, kwargs, ("pad", ()))
    place = 2 * (value.dim() - 1 - value.cut_dim)
    if any(pads[place : place + 2]) or kwargs.get("mode", "constant") != "constant":
        return NotImplemented
    rest = (value.local, *args[1:])
    local = func(*rest, **{key: each for key, each in kwargs.items() if key != "input"})
    shape = list(local.shape)
    shape[value.cut_dim] = value.shape[value.cut_dim]
    return value.with_local(local, shape, value.cut_dim)


def _along_last_two(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = args[0]
    if value.from_end >= -2:
        return NotImplemented
    return value.with_local(func(value.local, *args[1:], **kwargs), value.shape, value.cut_dim)


RULES = {
    **dict.fromkeys(("view", "reshape"), _view),
    **dict.fromkeys(("view_as", "reshape_as"), _view_as),
    "flatten": _flatten,
    "unflatten": _unflatten,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    "t": _t,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("cat", "concat", "stack"), _cat),
    "pad": _pad,
    **dict.fromkeys(("tril", "triu"), _along_last_two),
}
