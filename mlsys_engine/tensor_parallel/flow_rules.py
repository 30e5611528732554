"""What each operator does to the cuts of its inputs; see `flow.py`.

A rule takes the flow, the operator's arguments and its outputs, and returns the layouts of the outputs. It
fails the cuts that the operator does not keep.
"""

from __future__ import annotations

from typing import Any

import torch

from mlsys_engine.tensor_parallel.cuts import Dim, Factor, Layout, cuts_of, length_of, plain, regroup
from mlsys_engine.tensor_parallel.flow import Flow

Layouts = list[Layout | None] | None


def _tensors(args: Any) -> list[torch.Tensor]:
    return [arg for arg in args if isinstance(arg, torch.Tensor)]


def pointwise(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    layouts = [flow.layout(tensor) for tensor in _tensors((*args, *kwargs.values()))]
    if len(_tensors(args)) == 1 and (refs := flow.refs(args[0])) is not None:
        flow.set_refs(outputs[0], refs)  # a cast of a weight
    return [flow.joined(tuple(outputs[0].shape), layouts, "elementwise")] * len(outputs)


def view(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    source, result = args[0], outputs[0]
    if (refs := flow.refs(source)) is not None:
        kept = [(length, ref) for length, ref in zip(source.shape, refs, strict=True) if length != 1]
        if [length for length, _ in kept] == [length for length in result.shape if length != 1]:
            rest = iter(kept)
            flow.set_refs(result, tuple(next(rest)[1] if length != 1 else None for length in result.shape))
    layout = flow.layout(source)
    if not cuts_of(layout):
        return None
    again = regroup(layout, tuple(result.shape), flow.size)
    if isinstance(again, str):
        flow.fail([layout], again)
        return None
    return [again]


def permute(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    return _moved(flow, args[0], outputs[0], [dim % args[0].ndim for dim in args[1]])


def transpose(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    order = list(range(args[0].ndim))
    if order:
        first, second = (args[1], args[2]) if len(args) > 2 else (0, -1)
        order[first], order[second] = order[second], order[first]
    return _moved(flow, args[0], outputs[0], order)


def _moved(flow: Flow, source: Any, result: Any, order: list[int]) -> Layouts:
    if (refs := flow.refs(source)) is not None:
        flow.set_refs(result, tuple(refs[dim] for dim in order))
    layout = flow.layout(source)
    return [tuple(layout[dim] for dim in order)]


def expand(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    source, shape = args[0], tuple(outputs[0].shape)
    added = len(shape) - source.ndim
    if (refs := flow.refs(source)) is not None:
        flow.set_refs(outputs[0], (None,) * added + refs)
    layout = flow.layout(source)
    if not cuts_of(layout):
        return None
    whole = plain(shape)
    kept = [dim if length_of(dim) == shape[added + index] else whole[added + index]
            for index, dim in enumerate(layout)]  # fmt: skip
    return [(*whole[:added], *kept)]


def select(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    source, dim = args[0], args[1] % args[0].ndim
    if (refs := flow.refs(source)) is not None:
        flow.set_refs(outputs[0], refs[:dim] + refs[dim + 1 :])
    layout = flow.layout(source)
    if not _whole(flow, layout, dim, "a choice along a cut dim"):
        return None
    return [layout[:dim] + layout[dim + 1 :]]


def unbind(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    dim = args[1] if len(args) > 1 else 0
    return (select(flow, (args[0], dim), {}, outputs) or []) * len(outputs)


def slice_(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    source, dim = args[0], (args[1] if len(args) > 1 else 0) % args[0].ndim
    if outputs[0].shape == source.shape:
        return clone(flow, args, kwargs, outputs)
    layout = flow.layout(source)
    factors = layout[dim]
    if len(factors) == 1 and factors[0].cut is not None and factors[0].segments:
        start = (args[2] or 0) if len(args) > 2 else 0
        borders = _borders(factors[0].segments)
        length = int(outputs[0].shape[dim])
        if start in borders and factors[0].segments[borders.index(start)] == length:
            return [_replaced(layout, dim, (Factor(length, factors[0].cut),))]
    if factors and factors[0].cut is not None and len(factors) == 1 and not factors[0].segments:
        length, total = int(outputs[0].shape[dim]), factors[0].length
        if total % length == 0:
            factors[0].cut.root().wanted_segments = (length,) * (total // length)
    if not _whole(flow, layout, dim, "a slice of a cut dim"):
        return None
    return [_replaced(layout, dim, plain(outputs[0].shape)[dim])]


def split(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    given = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    source, dim = args[0], given % args[0].ndim
    layout, lengths = flow.layout(source), tuple(int(part.shape[given]) for part in outputs)
    factors = layout[dim]
    if not any(factor.cut for factor in factors):
        return [_replaced(layout, dim, plain(part.shape)[dim]) for part in outputs]
    if len(factors) == 1 and factors[0].segments == lengths:
        return [_replaced(layout, dim, (Factor(length, factors[0].cut),)) for length in lengths]
    cut = factors[0].cut
    if len(factors) == 1 and not factors[0].segments and cut is not None:
        cut.root().wanted_segments = lengths
    flow.fail([layout], "a split of a cut dim")
    return None


def cat(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    given = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    dim = given % outputs[0].ndim
    layouts = [flow.layout(tensor) for tensor in args[0] if tensor.numel()]
    if not all(_whole(flow, layout, dim, "a concatenation along a cut dim") for layout in layouts):
        flow.fail(layouts, "a concatenation along a cut dim")
        return None
    others = [_replaced(layout, dim, ()) for layout in layouts]
    shape = tuple(outputs[0].shape)
    joined = flow.joined((*shape[:dim], 1, *shape[dim + 1 :]), others, "cat")
    return None if joined is None else [_replaced(joined, dim, plain(shape)[dim])]


def clone(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    if (refs := flow.refs(args[0])) is not None:
        flow.set_refs(outputs[0], refs)
    return [flow.layout(args[0])] * len(outputs)


def mm(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    """(batch..., rows, inner) times (batch..., inner, columns)."""
    left, right = args[0], args[1]
    x, w = flow.layout(left), flow.layout(right)
    if (refs := flow.refs(right)) is not None:
        cut = flow.contracted(x[-1], refs[-2], refs[-1])
        place = refs[-1]
        last = plain(outputs[0].shape)[-1]
        if cut is not None and place is not None:
            last = (Factor(int(right.shape[-1]), cut, cut.root().places.get(place, ())),)
        return [(*_uncut(x, -1)[:-1], last)]
    if any(factor.cut for factor in (*x[-1], *w[-2])):
        flow.fail([x, w], "a product that is summed over a cut dim")
        return None
    batch = flow.joined(tuple(outputs[0].shape[:-2]), [x[:-2], w[:-2]], "matmul")
    return [(*(batch or plain(outputs[0].shape[:-2])), x[-2], w[-1])]


def addmm(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    return mm(flow, args[1:], kwargs, outputs)


def grouped_mm(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    """Rows (S, K), sorted by expert, times a stack of weights (E, K, N)."""
    refs = flow.refs(args[1])
    place = refs[0] if refs is not None and args[1].ndim == 3 else None
    if place is None or args[1].shape[0] < flow.size or not flow.experts(place):
        return mm(flow, args, kwargs, outputs)
    flow.fail([flow.layout(args[0])], "rows that are sent to experts")
    return None


def embedding(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    refs = flow.refs(args[0])
    if refs is not None and refs[0] is not None:
        flow.table(refs[0][0], args[1])
    ids = flow.layout(args[1])
    flow.fail([ids], "ids of an embedding")
    return None


def reduction(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    source = args[0]
    layout = flow.layout(source)
    if not cuts_of(layout):
        return None
    given = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(source.ndim))
    chosen = [dim % source.ndim for dim in dims]
    if not all(_whole(flow, layout, dim, "a reduction over a cut dim") for dim in chosen):
        return None
    if outputs[0].ndim == source.ndim:
        return [tuple(() if dim in chosen else part for dim, part in enumerate(layout))] * len(outputs)
    return [tuple(part for dim, part in enumerate(layout) if dim not in chosen)] * len(outputs)


def along_dim(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    """softmax, cumsum and the like: the named dim is read as a whole, the others keep their cuts."""
    layout = flow.layout(args[0])
    if not _whole(flow, layout, args[1] % args[0].ndim, "a softmax or a running sum over a cut dim"):
        return None
    return [layout]


def log_softmax(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    """Of logits in a loss: a loss over a cut vocabulary needs two sums a row, not the logits."""
    return [flow.layout(args[0])]


def fresh(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    """New values of a shape, a mask of dropout for one: nothing of the old ones is read."""
    return None


def nll_loss(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    return None


def normalization(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    layout = flow.layout(args[0])
    first = args[0].ndim - len(args[1])
    if not all(
        _whole(flow, layout, dim, "a normalization over a cut dim") for dim in range(first, len(layout))
    ):
        return None
    return [layout]


def attention(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    """(B, heads, T, head dim): cut by heads."""
    layouts = [flow.layout(tensor) for tensor in args[:3]]
    if any(cuts_of(layout[2:]) for layout in layouts):
        flow.fail(layouts, "attention over values that are not cut by heads")
        return None
    whole, queries = plain(outputs[0].shape), int(outputs[0].shape[1])
    read: list[Layout] = []
    for layout in layouts:
        ratio = queries // length_of(layout[1])  # grouped heads: each is read by as many queries
        read.append((layout[0], layout[1] if ratio == 1 else (*layout[1], Factor(ratio))))
    heads = flow.joined(tuple(outputs[0].shape[:2]), read, "attention")
    return None if heads is None else [(*heads, *whole[2:])]


def index(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    source, indices = args[0], list(args[1])
    indices += [None] * (source.ndim - len(indices))
    used = [dim for dim, each in enumerate(indices) if each is not None]
    layout = flow.layout(source)
    adjacent = bool(used) and used == list(range(used[0], used[-1] + 1))
    is_mask = any(indices[dim].dtype == torch.bool for dim in used)
    if (
        not adjacent
        or is_mask
        or not all(_whole(flow, layout, dim, "a choice along a cut dim") for dim in used)
    ):
        flow.fail([layout], "an index")
        return None
    chosen = outputs[0].ndim - (source.ndim - len(used))
    middle = plain(outputs[0].shape)[used[0] : used[0] + chosen]
    if (refs := flow.refs(source)) is not None:
        flow.set_refs(outputs[0], refs[: used[0]] + (None,) * chosen + refs[used[-1] + 1 :])
    return [(*layout[: used[0]], *middle, *layout[used[-1] + 1 :])]


def index_add(flow: Flow, args: Any, kwargs: Any, outputs: Any) -> Layouts:
    """Adds rows of a source to some rows: the other dims are elementwise."""
    target, dim, source = args[0], args[1] % args[0].ndim, args[3]
    layouts = [flow.layout(target), flow.layout(source)]
    if not all([_whole(flow, layout, dim, "a choice along a cut dim") for layout in layouts]):
        return None
    shape = tuple(target.shape)
    others = [_replaced(layout, dim, ()) for layout in layouts]
    joined = flow.joined((*shape[:dim], 1, *shape[dim + 1 :]), others, "index_add")
    return [plain(shape) if joined is None else _replaced(joined, dim, plain(shape)[dim])]


def _whole(flow: Flow, layout: Layout, dim: int, why: str) -> bool:
    """Whether a dim is not cut; fails its cut otherwise."""
    cut = [factor for factor in layout[dim] if factor.cut is not None]
    if not cut:
        return True
    if len(layout[dim]) == 1 and not cut[0].segments and cut[0].length <= 8:
        # Few: the thirds of a fused projection that the size happens to divide.
        root = cut[0].cut.root() if cut[0].cut is not None else None
        if root is not None and len(root.columns) == 1:
            root.wanted_segments = root.wanted_segments or (0,) * cut[0].length
    flow.fail([layout], why)
    return False


def _uncut(layout: Layout, dim: int) -> Layout:
    whole = tuple(Factor(factor.length) for factor in layout[dim])
    return _replaced(layout, dim % len(layout), whole)


def _replaced(layout: Layout, dim: int, with_: Dim) -> Layout:
    return (*layout[:dim], with_, *layout[dim + 1 :])


def _borders(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


RULES: dict[str, Any] = {
    "pointwise": pointwise, "native_dropout": pointwise, "masked_fill": pointwise, "where": pointwise,
    "bernoulli": pointwise,
    "empty_like": fresh, "zeros_like": fresh, "ones_like": fresh, "full_like": fresh,
    "rand_like": fresh, "randn_like": fresh, "new_empty": fresh, "new_zeros": fresh, "new_ones": fresh,
    "new_full": fresh,
    "view": view, "_unsafe_view": view, "reshape": view, "unsqueeze": view, "squeeze": view,
    "permute": permute, "transpose": transpose, "t": transpose, "expand": expand,
    "select": select, "unbind": unbind, "slice": slice_, "cat": cat,
    "split": split, "split_with_sizes": split, "chunk": split,
    "clone": clone, "_to_copy": clone, "alias": clone, "detach": clone, "contiguous": clone,
    "lift_fresh": clone,
    "mm": mm, "bmm": mm, "_grouped_mm": grouped_mm, "addmm": addmm, "baddbmm": addmm,
    "embedding": embedding, "index": index, "index_add": index_add,
    "mean": reduction, "sum": reduction, "amax": reduction, "amin": reduction, "var": reduction,
    "_softmax": along_dim, "cumsum": along_dim, "_safe_softmax": along_dim,
    "_log_softmax": log_softmax, "nll_loss_forward": nll_loss, "nll_loss2d_forward": nll_loss,
    "native_layer_norm": normalization, "_fused_rms_norm": normalization, "rms_norm": normalization,
    "_scaled_dot_product_flash_attention_for_cpu": attention,
    "_scaled_dot_product_flash_attention": attention,
    "_scaled_dot_product_efficient_attention": attention, "_scaled_dot_product_cudnn_attention": attention,
    "_scaled_dot_product_fused_attention_overrideable": attention,
}  # fmt: skip
