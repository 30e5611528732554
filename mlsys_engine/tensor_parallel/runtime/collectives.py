"""The three crossings between values that are whole on every rank and values that are cut, with their duals.

A whole value, and its gradient, are the same on all ranks. Where whole values meet cut ones, each rank's
gradient of the whole one is a term of a sum; where a cut dim is summed over, the value is. Megatron-LM calls
the first two f and g (Shoeybi et al. 2019).

| crossing | forward | backward |
|---|---|---|
| enter | nothing | all-reduce |
| leave | all-reduce | nothing |
| gather | all-gather | each rank takes its part |
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine.tensor_parallel.sharding import Sharding


def enter(whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A whole value on its way into a computation on cut ones."""
    if not (whole.requires_grad and torch.is_grad_enabled()):
        return whole
    result: torch.Tensor = _Enter.apply(whole, group)
    return result


def leave(term: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks of what each has."""
    result: torch.Tensor = _Leave.apply(term, group)
    return result


def gather(local: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole value from every rank's part of it."""
    result: torch.Tensor = _Gather.apply(local, sharding, group)
    return result


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _sum(term, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sharding, ctx.rank = sharding, dist.get_rank(group)
        return all_parts(local, sharding, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.sharding.take(gradient, ctx.rank), None, None


def all_parts(local: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole from the parts, which may differ in length; they travel padded to the longest."""
    lengths = [sum(stop - start for start, stop in intervals) for intervals in sharding.parts]
    dim, longest = sharding.dim, max(lengths)
    first = local.detach().movedim(dim, 0)
    # Booleans travel as bytes, which every backend has.
    sent = first.new_empty((longest, *first.shape[1:])) if min(lengths) < longest else first.contiguous()
    if min(lengths) < longest:
        sent.zero_()[: first.shape[0]].copy_(first)
    raw = sent.view(torch.uint8) if sent.dtype is torch.bool else sent
    arrived = [torch.empty_like(raw) for _ in lengths]
    dist.all_gather(arrived, raw, group=group)
    parts = [
        part.view(sent.dtype)[:length].movedim(0, dim) for part, length in zip(arrived, lengths, strict=True)
    ]
    return sharding.assemble(parts)


def _sum(term: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = term.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
