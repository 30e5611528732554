"""Floating-point operations of one operator call, by torch's own table and a few that it lacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

_aten = torch.ops.aten


def flops_of(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """FLOPs of a dispatched operator (an OpOverload); 0 for one that is in no table."""
    from torch.utils.flop_counter import flop_registry

    packet = operator._overloadpacket
    own = _FORMULAS.get(packet)
    if own is not None:
        return own(*args)
    formula: Any = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=output))


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> int:
    # B batch, H heads, Q queries, K keys, D width of a head, V of a value. Masks are not deducted.
    *batch, num_queries, width = query.shape
    return 2 * math.prod(batch) * num_queries * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(
    _: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any
) -> int:
    # The scores are computed again; then each of the two products has a gradient for both of its factors.
    *batch, num_queries, width = query.shape
    return 2 * math.prod(batch) * num_queries * key.shape[-2] * (3 * width + 2 * value.shape[-1])


def _grouped_product(left: torch.Tensor, right: torch.Tensor, *_: Any) -> int:
    # Each row of `left` meets one group's matrix; only two three-dimensional factors are a batched product.
    groups = left.shape[0] if left.ndim == right.ndim == 3 else 1
    return 2 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._grouped_mm: _grouped_product,
}
