"""Functions that take some of a value: slices, pieces, chosen rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor
from mlsys_engine.tensor_parallel.sharding import Sharding


def sliced(value: CutTensor, start: int, stop: int) -> CutTensor | None:
    """A range of the cut dim; None where a rank has nothing of it."""
    parts = tuple(
        tuple((max(a, start) - start, min(b, stop) - start) for a, b in part if a < stop and b > start)
        for part in value.sharding.parts
    )
    if not all(parts):
        return None
    before = sum(max(0, min(b, start) - a) for a, b in value.sharding.parts[value.context.rank])
    length = sum(b - a for a, b in parts[value.context.rank])
    shape = list(value.shape)
    shape[value.cut_dim] = stop - start
    local = value.local.narrow(value.cut_dim, before, length)
    return CutTensor(local, shape, Sharding(dim=value.cut_dim, parts=parts), value.context)


def _pieces(value: CutTensor, lengths: Sequence[int], dim: int) -> Any:
    dim %= value.dim()
    if dim != value.cut_dim:
        shapes = [
            [length if place == dim else old for place, old in enumerate(value.shape)] for length in lengths
        ]
        return tuple(
            value.with_local(local, shape, value.cut_dim)
            for local, shape in zip(value.local.split(list(lengths), dim), shapes, strict=True)
        )
    ends = list(accumulate(lengths))
    pieces = [sliced(value, end - length, end) for length, end in zip(lengths, ends, strict=True)]
    return NotImplemented if any(piece is None for piece in pieces) else tuple(pieces)


def _split(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = args[0]
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size", kwargs.get("split_size_or_sections"))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if isinstance(sizes, int):
        length = value.shape[dim]
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    return _pieces(value, sizes, dim)


def _chunk(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = args[0]
    chunks = args[1] if len(args) > 1 else kwargs["chunks"]
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    length = value.shape[dim]
    size = -(-length // chunks)
    return _pieces(value, [min(size, length - start) for start in range(0, length, size)], dim)


def _unbind(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % value.dim()
    if dim == value.cut_dim:
        return NotImplemented
    return tuple(_selected(value, dim, index) for index in range(value.shape[dim]))


def _selected(value: CutTensor, dim: int, index: int) -> CutTensor:
    shape = [length for place, length in enumerate(value.shape) if place != dim]
    return value.with_local(value.local.select(dim, index), shape, value.cut_dim - (dim < value.cut_dim))


def _select(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = args[0]
    dim = (args[1] if len(args) > 1 else kwargs["dim"]) % value.dim()
    index = args[2] if len(args) > 2 else kwargs["index"]
    return NotImplemented if dim == value.cut_dim else _selected(value, dim, int(index))


def _narrow(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 4:
        return NotImplemented
    value, dim, start, length = args
    index: list[Any] = [slice(None)] * value.dim()
    index[dim % value.dim()] = slice(int(start), int(start) + int(length))
    return _indexed(value, tuple(index))


def _getitem(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value, index = args
    if not isinstance(value, CutTensor):
        return NotImplemented
    return _indexed(value, index if isinstance(index, tuple) else (index,))


def _indexed(value: CutTensor, index: tuple[Any, ...]) -> Any:
    """The items but that of the cut dim are those of each part; NotImplemented where it is chosen from."""
    items = _explicit(index, value.dim())
    place = None if items is None or _scattered(items) else _place_of(items, value.cut_dim)
    if items is None or place is None or not isinstance(items[place], slice):
        return NotImplemented
    start, stop, step = items[place].indices(value.shape[value.cut_dim])
    part = sliced(value, start, max(start, stop)) if step == 1 else None
    if part is None:
        return NotImplemented
    local = part.local[tuple(slice(None) if at == place else item for at, item in enumerate(items))]
    dim = _num_dims(items[:place])
    shape = list(local.shape)
    shape[dim] = part.shape[part.cut_dim]
    return part.with_local(local, shape, dim)


def _place_of(items: list[Any], dim: int) -> int | None:
    """Which item is that of a dim of the value."""
    sources = [place for place, item in enumerate(items) if item is not None]
    return sources[dim]


def _num_dims(items: list[Any]) -> int:
    """Dims of the result that items make: lists of indices side by side make those of one of them."""
    chosen = [item.shape for item in items if _chooses(item)]
    plain = sum(item is None or isinstance(item, slice) for item in items)
    return plain + (len(torch.broadcast_shapes(*chosen)) if chosen else 0)


def _scattered(items: list[Any]) -> bool:
    """Whether lists of indices are apart from each other, which puts their dims first."""
    places = [place for place, item in enumerate(items) if _chooses(item)]
    if not places:
        return False
    return places[-1] - places[0] + 1 != len(places) or any(isinstance(item, int) for item in items)


def _chooses(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.dim() > 0


def _explicit(index: tuple[Any, ...], ndim: int) -> list[Any] | None:
    """One item for each dim (and None where one is added); None for items of other kinds."""
    items: list[Any] = []
    for item in index:
        if isinstance(item, CutTensor | bool):
            return None
        if isinstance(item, torch.Tensor):
            if item.dtype is torch.bool or (item.dim() > 0 and item.is_floating_point()):
                return None
            items.append(int(item) if item.dim() == 0 else item)
        elif isinstance(item, int | slice) or item is None or item is Ellipsis:
            items.append(item)
        else:
            return None
    missing = ndim - sum(item is not None and item is not Ellipsis for item in items)
    filled = [slice(None)] * missing
    if Ellipsis in [item for item in items if not isinstance(item, torch.Tensor)]:
        at = next(place for place, item in enumerate(items) if item is Ellipsis)
        return [*items[:at], *filled, *items[at + 1 :]]
    return [*items, *filled]


def _index_select(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 3 or not isinstance(args[0], CutTensor):
        return NotImplemented
    value, dim, index = args
    dim %= value.dim()
    if dim == value.cut_dim or isinstance(index, CutTensor):
        return NotImplemented
    shape = list(value.shape)
    shape[dim] = index.numel()
    return value.with_local(value.local.index_select(dim, index), shape, value.cut_dim)


RULES = {
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "select": _select,
    "narrow": _narrow,
    "getitem": _getitem,
    "index_select": _index_select,
}
