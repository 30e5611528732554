"""Brings the gradients of tied parameters together at the end of a step, so that all copies have the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mlsys_engine.pipeline.runtime.links import Links
from mlsys_engine.pipeline.runtime.packing import Layout, Message
from mlsys_engine.pipeline.runtime.ties import SUMMED, Tie


@dataclass(frozen=True)
class _Copies:
    """A tied parameter on this rank, and the ranks that have it: the owner's, then the others."""

    parameter: nn.Parameter
    owner: int
    others: tuple[int, ...]
    is_summed: bool


class TiedSums:
    """The end of a step for tied parameters; `ready` is told of a parameter that was given a gradient."""

    def __init__(
        self,
        model: nn.Module,
        ties: Sequence[Tie],
        choices: Mapping[str, str],
        *,
        placement: Sequence[int],
        rank: int,
        links: Links,
        ready: Callable[[nn.Parameter], None],
    ) -> None:
        self._rank, self._links, self._ready = rank, links, ready
        self._copies = []
        for tie in ties:
            ranks = list(dict.fromkeys(placement[stage] for stage in tie.stages))
            if rank in ranks and len(ranks) > 1:
                own = next(stage for stage in tie.stages if placement[stage] == rank)
                parameter = model.get_parameter(tie.names(own)[0])
                is_summed = choices[tie.name] == SUMMED
                self._copies.append(_Copies(parameter, ranks[0], tuple(ranks[1:]), is_summed))

    def finish(self) -> None:
        """Every rank of the pipeline calls it after its last backward of the step."""
        for copies in self._copies:
            if copies.is_summed and self._rank == copies.owner:
                for rank in copies.others:
                    self._add(copies.parameter, self._received(rank, copies.parameter))
            elif copies.is_summed:
                self._send(copies.owner, copies.parameter)
            if self._rank == copies.owner:
                for rank in copies.others:
                    self._send(rank, copies.parameter)
            else:
                self._put(copies.parameter, self._received(copies.owner, copies.parameter))
        self._links.flush()

    def _send(self, rank: int, parameter: nn.Parameter) -> None:
        message = Message((parameter.grad,))
        self._links.send(rank, message, _layout(parameter), announce=False)

    def _received(self, rank: int, parameter: nn.Parameter) -> torch.Tensor | None:
        layout = _layout(parameter)
        expected = self._links.expect(rank, lambda: layout, announced=False)
        return self._links.wait(rank, expected).tensors[0]

    @torch.no_grad()
    def _add(self, parameter: nn.Parameter, share: torch.Tensor | None) -> None:
        if share is None:
            return
        if parameter.grad is None:
            self._put(parameter, share)
        else:
            parameter.grad.add_(share)

    @torch.no_grad()
    def _put(self, parameter: nn.Parameter, total: torch.Tensor | None) -> None:
        if total is None:
            return
        if parameter.grad is None:
            parameter.grad = total
            self._ready(parameter)
        else:
            parameter.grad.copy_(total)


def _layout(parameter: nn.Parameter) -> Layout:
    return Layout(((tuple(parameter.shape), parameter.dtype),))
