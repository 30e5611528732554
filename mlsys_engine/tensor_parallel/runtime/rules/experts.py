"""Stacks of experts' weights, and rows that are sorted by the expert that each is sent to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlsys_engine.tensor_parallel.runtime.rules.fitting import fitted
from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor
from mlsys_engine.tensor_parallel.sharding import Sharding


def _grouped_mm(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _product(context, *args, **kwargs)


def _product(  # noqa: PLR0917 (torch's own signature)
    context: Context, rows: Any, weights: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Rows (S, K) times the weights (E, K, N) of the expert whose rows end at its place in `offs` (E,)."""
    is_stack = isinstance(weights, CutTensor) and weights.dim() == 3 and rows.dim() == 2
    if not is_stack or offs is None or bias is not None or out_dtype is not None:
        return NotImplemented
    offs, shape = context.whole(offs), (rows.shape[0], weights.shape[2])
    if weights.cut_dim == 2:  # column
        local = torch._grouped_mm(context.entering(rows), weights.local, offs)
        return weights.with_local(local, shape, 1)
    if weights.cut_dim == 1:  # row
        part = fitted(context, rows, weights, -1)
        return context.summed(torch._grouped_mm(part, weights.local, offs))
    return _by_experts(context, rows, weights, offs)


def _by_experts(context: Context, rows: Any, weights: CutTensor, offs: torch.Tensor) -> Any:
    """Every rank multiplies the rows of its experts: a value cut along rows, in parts as long as they are."""
    starts = [0, *offs.tolist()]
    if starts[-1] != rows.shape[0] or any(len(part) != 1 for part in weights.sharding.parts):
        return NotImplemented
    bounds = tuple(((starts[first], starts[stop]),) for ((first, stop),) in weights.sharding.parts)
    by_expert = Sharding(dim=0, parts=bounds)
    if isinstance(rows, CutTensor) and rows.sharding == by_expert:
        own = rows.local
    else:
        own = context.taken(context.whole(rows), by_expert)
    ((first, stop),) = weights.sharding.parts[context.rank]
    if len(own):
        local = torch._grouped_mm(own, weights.local, offs[first:stop] - starts[first])
    else:
        local = own @ weights.local[0]  # no rows, and a gradient of zeros for the weights
    return CutTensor(local, (rows.shape[0], weights.shape[2]), by_expert, context)


RULES = {"_grouped_mm": _grouped_mm}
