"""The crossings between values that are whole on every rank and values that are cut, with their duals.

A whole value, and its gradient, are the same on all ranks. Where whole values meet cut ones, each rank's
gradient of the whole one is a term of a sum; where a cut dim is summed over, the value is. Megatron-LM calls
the first two f and g (Shoeybi et al. 2019), and the last two their namesakes of sequence parallelism
(Korthikanti et al. 2022).

| crossing | forward | backward |
|---|---|---|
| enter | nothing | all-reduce |
| leave | all-reduce | nothing |
| gather | all-gather | each rank takes its part |
| take | each rank takes its part | all-gather |
| gather_entering | all-gather | reduce-scatter |
| leave_cut | reduce-scatter | all-gather |
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


def take(whole: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of a whole value."""
    if not (whole.requires_grad and torch.is_grad_enabled()):
        return sharding.take(whole, dist.get_rank(group))
    result: torch.Tensor = _Take.apply(whole, sharding, group)
    return result


def gather_entering(local: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
    """The whole value on its way into a computation on values that are cut otherwise."""
    result: torch.Tensor = _GatherEntering.apply(local, sharding, group)
    return result


def leave_cut(term: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of the sum over the ranks of what each has."""
    result: torch.Tensor = _LeaveCut.apply(term, sharding, group)
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


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sharding, ctx.group = sharding, group
        return sharding.take(whole, dist.get_rank(group)).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_parts(gradient, ctx.sharding, ctx.group), None, None


class _GatherEntering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sharding, ctx.group = sharding, group
        return all_parts(local, sharding, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return part_of_sum(gradient, ctx.sharding, ctx.group), None, None


class _LeaveCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, term: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sharding, ctx.group = sharding, group
        return part_of_sum(term, sharding, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_parts(gradient, ctx.sharding, ctx.group), None, None


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


def part_of_sum(term: torch.Tensor, sharding: Sharding, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part of a sum over ranks; parts of several lengths travel padded to the longest."""
    if dist.get_backend(group) == "gloo":  # whose reduce-scatter takes longer than its all-reduce
        return sharding.take(_sum(term, group), dist.get_rank(group)).contiguous()
    dim = sharding.dim
    lengths = [sum(stop - start for start, stop in intervals) for intervals in sharding.parts]
    longest, first = max(lengths), term.detach().movedim(dim, 0)
    sent = first.new_zeros((len(lengths), longest, *first.shape[1:]))
    for intervals, to in zip(sharding.parts, sent, strict=True):
        at = 0
        for start, stop in intervals:
            to[at : at + stop - start] = first[start:stop]
            at += stop - start
    result = torch.empty_like(sent[0])
    dist.reduce_scatter(result, list(sent), group=group)
    return result[: lengths[dist.get_rank(group)]].movedim(0, dim).contiguous()


def _sum(term: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = term.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
