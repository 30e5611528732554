"""The one small all-reduce of a step: loss, count, and which parameters and buffers some rank touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class StepStatistics:
    """A float64 vector [loss sum, count, a mark for each parameter, a mark for each watched buffer].

    Marks are summed, so a positive one means "some rank". Counts are exact up to 2**53.
    """

    def __init__(self, num_parameters: int, num_buffers: int, device: torch.device) -> None:
        self.vector = torch.zeros(2 + num_parameters + num_buffers, dtype=torch.float64, device=device)
        self._num_parameters = num_parameters

    def fill(
        self, loss_sum: torch.Tensor, count: torch.Tensor, used: Sequence[bool], changed: Sequence[bool]
    ) -> None:
        """This rank's share, before the reduction."""
        self.vector[0], self.vector[1] = loss_sum, count
        self.vector[2:] = torch.tensor([*used, *changed], dtype=torch.float64)

    @property
    def loss_sum(self) -> torch.Tensor:
        return self.vector[0].clone()

    @property
    def count(self) -> torch.Tensor:
        return self.vector[1].clone()

    def used_anywhere(self) -> list[bool]:
        """One flag a parameter. Reading it waits for the device."""
        return (self.vector[2 : 2 + self._num_parameters] > 0).tolist()

    def changed_anywhere(self) -> list[bool]:
        """One flag a watched buffer. Reading it waits for the device."""
        return (self.vector[2 + self._num_parameters :] > 0).tolist()
