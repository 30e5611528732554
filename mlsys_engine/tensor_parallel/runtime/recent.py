"""What the last values became that crossed, for the next few readers of each: one message for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlsys_engine.tensor_parallel.runtime.kept import Gathered
from mlsys_engine.tensor_parallel.runtime.values import CutTensor

_REMEMBERED = 2  # a value is read by its neighbours in a model's code; more would hold memory


@dataclass(frozen=True, eq=False)
class Crossed:
    """A value and what it became."""

    value: torch.Tensor
    version: int
    has_graph: bool
    result: torch.Tensor
    kept: Gathered | None


class Recent:
    """The last values of one kind of crossing."""

    def __init__(self) -> None:
        self.crossed: list[Crossed] = []

    def get(
        self, value: torch.Tensor, make: Callable[[], torch.Tensor], kept: Callable[[], Gathered | None]
    ) -> torch.Tensor:
        """What `value` has become already, or becomes now."""
        version = value.local._version if isinstance(value, CutTensor) else value._version
        has_graph = torch.is_grad_enabled()
        for each in self.crossed:
            if each.value is value and (each.version, each.has_graph) == (version, has_graph):
                return each.result
        made = Crossed(value, version, has_graph, make(), kept())
        self.crossed = [*self.crossed[1 - _REMEMBERED :], made]
        return made.result

    def forget(self) -> None:
        """At the end of a pass."""
        self.crossed = []
