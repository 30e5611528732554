"""What of a model a rank holds when other ranks hold the rest of it: the runner's view of the other axes.

Data parallelism alone has none: a rank holds everything. A strategy that divides the model gives the runner a
Share, and everything else stays as it is: buckets are reduced over ranks with other data, the optimizer steps
what is here, and the norm, the loss and the state are brought together over the ranks with other parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.data_parallel.accumulation import Accumulation
from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.optim import LossScaler
from mlsys_engine.plan import Plan


class Share(Protocol):
    """A rank's part of the model. Methods marked so are called by all ranks of `parts` together."""

    @property
    def plan(self) -> Plan:
        """The plan with those buckets alone whose parameters are here, in the shapes that they have here."""

    @property
    def data(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part and feed other data; None where this rank is the only one."""

    @property
    def parts(self) -> dist.ProcessGroup:
        """The ranks that hold all parts together and are fed the same data."""

    @property
    def data_rank(self) -> int: ...

    @property
    def counted(self) -> tuple[bool, ...]:
        """For each bucket of `plan` whether this rank counts it in the norm: one rank of `parts` does."""

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss is to be added, or another rank of `parts` has the same."""

    @property
    def elsewhere(self) -> frozenset[str]:
        """Names of parameters and buffers that are on other ranks of `parts` alone."""

    @property
    def holds_parts(self) -> bool:
        """Whether some parameters here are parts of what the model has by that name."""

    def joined(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A tensor of a parameter's shape here as one of the whole parameter's. Called by the ranks that hold
        its parts together."""

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ConfigError for a rule that cannot step the parts by themselves."""

    def take(self, model: nn.Module) -> None:
        """Drops what belongs to other ranks. The model is whole, and the same on all ranks."""

    def accumulation(
        self, model: nn.Module, reducer: Reducer, device: torch.device, scaler: LossScaler | None
    ) -> Accumulation:
        """What runs the model from now on; its sums are reduced by `reducer`, which launches nothing itself
        where `launches`."""

    @property
    def launches(self) -> bool:
        """Whether the accumulation launches buckets, instead of autograd's hooks."""

    def local(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a state of the whole model (a Runner's), what this rank holds."""

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's copied state and those of the others as one. Called by all of `parts` together."""

    def give_back(self, model: nn.Module) -> None:
        """Makes the model whole again. Called by all of `parts` together."""


def over_parts(
    share: Share | None, loss_sum: torch.Tensor, count: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over data as sums over everything: each rank of a divided model adds what it counts."""
    if share is None:
        return loss_sum, count, squares
    totals = torch.stack([loss_sum, count, squares.to(loss_sum)])
    if not share.counts_loss:
        totals[:2] = 0
    dist.all_reduce(totals, group=share.parts)
    return totals[0], totals[1], totals[2]
