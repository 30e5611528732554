"""Float64 everywhere: of the plan, of the batch, and of what a model computes in a type that it names itself.

Models cast parts of their forward to float32 by hand (norms, softmax, rotary angles). In float64 such a part
would round away the digits that a comparison needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mlsys_engine.plan import Plan

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS: tuple[Callable[..., Any], ...] = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class _Wide(TorchFunctionMode):
    """Takes every narrower floating type that a function is given for float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _CASTS:
            return args[0].to(torch.float64)
        if func is torch._grouped_mm and args[0].dtype is torch.float64:  # which torch has for narrower types
            return _grouped_mm(*args, **(kwargs or {}))
        return func(
            *(_wide(value) for value in args), **{key: _wide(value) for key, value in (kwargs or {}).items()}
        )


def _grouped_mm(
    rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, bias: None = None, out_dtype: Any = None
) -> torch.Tensor:
    """Rows (S, K) times the weights (E, K, N) of the group that `offs` (E,), where groups end, puts them in.

    torch has no bias here yet, and float64 is in place of any type of the output.
    """
    starts = [0, *offs.tolist()]
    groups = [
        rows[start:stop] @ weight for (start, stop), weight in zip(pairwise(starts), weights, strict=True)
    ]
    return torch.cat([*groups, rows.new_zeros(len(rows) - starts[-1], weights.shape[-1])])


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """Inside, float64 is the default type, and what asks for a narrower one gets float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            yield
    finally:
        torch.set_default_dtype(before)


def wide_plan(plan: Plan, notes: list[str]) -> Plan:
    """The plan with float64 in place of its precision and of its gradients' types; `notes` tell of it."""
    if plan.precision != "fp32":
        notes.append(f"{plan.precision} was replaced by float64, which shows what rounding would hide")
    if plan.activation:
        notes.append('no block was run again in backward: precision="model" compares that, too')
    buckets = tuple(replace(bucket, dtype="float64") for bucket in plan.buckets)
    return replace(plan, precision="fp32", activation=(), buckets=buckets)


def exact_plan(plan: Plan, notes: list[str]) -> Plan:
    """The plan without what is allowed to change numbers: compression and compilation."""
    if plan.compile:
        notes.append("the model was not compiled for this comparison")
        plan = replace(plan, compile=False)
    if plan.compression is not None:
        notes.append(f"compression {plan.compression!r} was left out: it loses digits on purpose")
        algorithms = tuple(
            (key, "all_reduce" if key == "gradients" else value)
            for key, value in plan.algorithms
            if not key.startswith("powersgd")
        )
        plan = replace(plan, compression=None, algorithms=algorithms)
    return plan


def cast_batch(batch: Any, dtype: torch.dtype | None) -> Any:
    """The batch with its floating tensors as `dtype`; None keeps their types."""

    def take(leaf: Any) -> Any:
        if dtype is None or not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.detach().to(dtype)

    if isinstance(batch, Mapping):  # transformers' batches are no nodes of a pytree
        return {key: cast_batch(value, dtype) for key, value in batch.items()}
    return [cast_batch(item, dtype) for item in batch] if isinstance(batch, list) else tree_map(take, batch)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value
