"""Products of matrices, and the attention made of them. Column and row parallelism: Shoeybi et al. 2019."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from mlsys_engine.tensor_parallel.runtime.rules.elementwise import RULES as ELEMENTWISE
from mlsys_engine.tensor_parallel.runtime.rules.fitting import fitted
from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor


def _linear(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return linear(context, *args, **kwargs)


def linear(context: Context, input: Any, weight: Any, bias: Any = None) -> Any:
    """`input` (..., K) times `weight` (N, K), plus `bias` (N)."""
    shape = (*input.shape[:-1], weight.shape[0])
    if not isinstance(weight, CutTensor):
        if not isinstance(input, CutTensor) or input.from_end == -1 or weight.dim() != 2:
            return NotImplemented
        if isinstance(bias, CutTensor):
            bias = context.whole(bias)
        own = None if bias is None else context.entered(bias)
        local = functional.linear(input.local, context.entered(weight), own)
        return input.with_local(local, shape, input.cut_dim)
    if weight.dim() != 2:
        return NotImplemented
    if weight.cut_dim == 0:  # column
        whole = context.entering(input)
        own = None if bias is None else fitted(context, bias, weight, -1)
        return weight.with_local(functional.linear(whole, weight.local, own), shape, len(shape) - 1)
    part = fitted(context, input, weight, -1)  # row
    total = context.summed(functional.linear(part, weight.local))
    return total if bias is None else _plus(context, total, bias)


def _addmm(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if kwargs or len(args) != 3:
        return NotImplemented
    bias, first, second = args
    product = matmul(context, first, second) if cut_any(first, second) else NotImplemented
    if product is NotImplemented:
        return NotImplemented
    return _plus(context, product, bias)


def _plus(context: Context, product: Any, bias: Any) -> Any:
    if isinstance(product, CutTensor) or isinstance(bias, CutTensor):
        return ELEMENTWISE["add"](context, torch.add, (product, bias), {})
    return product + bias


def cut_any(*values: Any) -> bool:
    return any(isinstance(value, CutTensor) for value in values)


def _matmul(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    first, second = args if func.__name__ != "__rmatmul__" else reversed(args)
    return matmul(context, first, second)


def matmul(context: Context, first: Any, second: Any) -> Any:
    """(..., M, K) times (..., K, N), each whole or cut at any dim."""
    if first.dim() < 2 or second.dim() < 2:
        return NotImplemented
    batch = torch.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    shape = (*batch, first.shape[-2], second.shape[-1])
    leads = [value for value in (first, second) if isinstance(value, CutTensor) and value.from_end < -2]
    if leads:
        lead = leads[0]
        if shape[lead.from_end] != lead.shape[lead.cut_dim]:
            return NotImplemented
        local = torch.matmul(fitted(context, first, lead), fitted(context, second, lead))
        return lead.with_local(local, shape, lead.from_end + len(shape))
    cut_first = first.from_end if isinstance(first, CutTensor) else 0
    cut_second = second.from_end if isinstance(second, CutTensor) else 0
    if cut_second == -2 or (cut_first == -1 and cut_second == 0):  # K
        left = fitted(context, first, second, -1) if cut_second else first.local
        right = second.local if cut_second else fitted(context, second, first, -2)
        return context.summed(torch.matmul(left, right))
    if cut_second == -1:  # N
        local = torch.matmul(context.entering(first), second.local)
        return second.with_local(local, shape, len(shape) - 1)
    local = torch.matmul(first.local, context.entering(second))  # M
    return first.with_local(local, shape, len(shape) - 2)


def _attention(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _attention_on(context, *args, **kwargs)


def _attention_on(  # noqa: PLR0917 (torch's own signature)
    context: Context,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Every rank has its heads, or its sequences. With dropout the scores are computed one after the other,
    as torch's own way with dropout on a CPU does, so that the random numbers are those of all heads."""
    if not isinstance(query, CutTensor) or query.from_end >= -2:
        return NotImplemented
    keys, values = (_heads(context, each, query) for each in (key, value))
    if keys is None or values is None:
        return NotImplemented
    mask = None if attn_mask is None else fitted(context, attn_mask, query)
    shape = (*query.shape[:-1], value.shape[-1])
    if not dropout_p:
        local = functional.scaled_dot_product_attention(
            query.local, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return query.with_local(local, shape, query.cut_dim)
    if keys.shape[-3] != query.local.shape[-3]:
        repeats = query.local.shape[-3] // keys.shape[-3]
        keys, values = (each.repeat_interleave(repeats, -3) for each in (keys, values))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.local * math.sqrt(factor)) @ (keys.transpose(-2, -1) * math.sqrt(factor))
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    weights = query.with_local(scores.softmax(-1), (*query.shape[:-1], key.shape[-2]), query.cut_dim)
    dropped = ELEMENTWISE["dropout"](context, functional.dropout, (weights, dropout_p), {})
    return query.with_local(dropped.local @ values, shape, query.cut_dim)


def _heads(context: Context, other: Any, query: CutTensor) -> torch.Tensor | None:
    """Keys or values for the query's part: cut alike, or of fewer heads of which each serves several."""
    if isinstance(other, CutTensor) and other.from_end == query.from_end:
        fewer, more = other.shape[other.cut_dim], query.shape[query.cut_dim]
        times = more // fewer if fewer and more % fewer == 0 else 0
        grown = tuple(tuple((a * times, b * times) for a, b in part) for part in other.sharding.parts)
        return other.local if grown == query.sharding.parts else None
    if other.shape[query.from_end] != query.shape[query.cut_dim]:
        return None
    return fitted(context, other, query)


RULES = {
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "rmatmul", "bmm", "mm"), _matmul),
    "scaled_dot_product_attention": _attention,
}
