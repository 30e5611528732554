"""Tables that are cut along their vocabulary: embeddings, and the cross-entropy of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from mlsys_engine.tensor_parallel.runtime.values import Context, CutTensor


def _embedding(context: Context, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _embedded(context, *args, **kwargs)


def _embedded(  # noqa: PLR0917 (torch's own signature)
    context: Context,
    input: torch.Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Each rank looks up what is in its rows, and zeros stand for the rest of the sum."""
    if (
        not isinstance(weight, CutTensor)
        or cut(input)
        or max_norm is not None
        or scale_grad_by_freq
        or sparse
    ):
        return NotImplemented
    rows = weight.shape[0]
    padding = None if padding_idx is None else padding_idx % rows
    shape = (*input.shape, weight.shape[1])
    if weight.cut_dim == 1:
        return weight.with_local(functional.embedding(input, weight.local, padding), shape, len(shape) - 1)
    if len(weight.sharding.parts[context.rank]) != 1:
        return NotImplemented
    start, stop = weight.sharding.parts[context.rank][0]
    here = (input >= start) & (input < stop)
    own = padding - start if padding is not None and start <= padding < stop else None
    found = functional.embedding((input - start).masked_fill(~here, 0), weight.local, own)
    return context.summed(found.masked_fill(~here.unsqueeze(-1), 0))


def cut(value: Any) -> bool:
    return isinstance(value, CutTensor)


def _cross_entropy(context: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _entropy(context, *args, **kwargs)


def _entropy(  # noqa: PLR0917 (torch's own signature)
    context: Any,
    input: Any,
    target: torch.Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """The logits of all classes are on no rank: what travels is two numbers and a maximum for each row."""
    classes = 1 if input.dim() > 1 else 0
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    if not cut(input) or cut(target) or not plain or target.is_floating_point() or input.cut_dim != classes:
        return NotImplemented
    if len(input.sharding.parts[context.rank]) != 1:
        return NotImplemented
    logits = input.local.movedim(classes, -1)
    start, stop = input.sharding.parts[context.rank][0]
    here = (target >= start) & (target < stop)
    largest = context.maximum(logits.detach().amax(-1))
    place = (target - start).masked_fill(~here, 0)
    exponentials, chosen = _Terms.apply(logits, largest, place, here)
    losses = context.left(exponentials).log() - context.left(chosen)
    counted = target != ignore_index
    losses = losses.masked_fill(~counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


class _Terms(torch.autograd.Function):
    """Sums of exp(logits - largest) and the targets' logits less `largest`, of this rank's classes.

    `logits` (..., C); the others (...). Keeps the exponentials alone.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, largest: torch.Tensor, place: torch.Tensor, here: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shifted = logits - largest.unsqueeze(-1)
        chosen = shifted.gather(-1, place.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0)
        exponentials = shifted.exp_()
        ctx.save_for_backward(exponentials, place, here)
        return exponentials.sum(-1), chosen

    @staticmethod
    def backward(ctx: Any, sums: torch.Tensor, chosen: torch.Tensor) -> Any:
        exponentials, place, here = ctx.saved_tensors
        gradient = exponentials * sums.unsqueeze(-1)
        gradient.scatter_add_(-1, place.unsqueeze(-1), chosen.masked_fill(~here, 0).unsqueeze(-1))
        return gradient, None, None, None


RULES = {"embedding": _embedding, "cross_entropy": _cross_entropy}
