"""The one small all-reduce of a step: loss, count, and which parameters and buffers some rank touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class StepStatistics:
    """A float64 vector [loss sum, count, a mark for each parameter, one for each watched buffer, norm terms].

    Marks are summed, so a positive one means "some rank". Counts are exact up to 2**53. A term of the norm
    comes from the one rank that owns it, and zeros from the others leave its bits alone.
    """

    def __init__(
        self, num_parameters: int, num_buffers: int, device: torch.device, num_norm_terms: int = 0
    ) -> None:
        self._num_parameters = num_parameters
        self._num_marks = num_parameters + num_buffers
        length = 2 + self._num_marks + num_norm_terms
        self.vector = torch.zeros(length, dtype=torch.float64, device=device)
        self._marks: tuple[bool, ...] = ()
        self._sent_marks = self.vector[:0]

    @property
    def norm_terms(self) -> torch.Tensor:
        """A view: this rank's terms before the reduction, everybody's after it."""
        return self.vector[2 + self._num_marks :]

    def clear(self) -> None:
        """Before a step."""
        self.vector.zero_()

    def fill(
        self, loss_sum: torch.Tensor, count: torch.Tensor, used: Sequence[bool], changed: Sequence[bool]
    ) -> None:
        """This rank's share, before the reduction."""
        self.vector[0], self.vector[1] = loss_sum, count
        marks = (*used, *changed)
        if marks != self._marks:  # which is rare, and waits for the device
            self._marks = marks
            self._sent_marks = torch.tensor(marks, dtype=torch.float64, device=self.vector.device)
        self.vector[2 : 2 + self._num_marks] = self._sent_marks

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
        return (self.vector[2 + self._num_parameters : 2 + self._num_marks] > 0).tolist()
