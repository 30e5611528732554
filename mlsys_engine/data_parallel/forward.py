"""From a batch to the model's output, and on to its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mlsys_engine.numerics import Loss, autocast, call_model, loss_sum_and_count, shifts_labels, to_device


class ForwardPass:
    """How a runner calls its model; batches may be on any device."""

    def __init__(self, model: nn.Module, *, loss: Loss | None, precision: str, device: torch.device) -> None:
        self._model, self._loss, self._precision, self._device = model, loss, precision, device
        self._causal = shifts_labels(model)

    def loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the loss, and the count that its mean is over."""
        batch = to_device(batch, self._device)
        with autocast(self._precision, self._device):
            return loss_sum_and_count(self.output(batch), batch, self._loss, causal=self._causal)

    def output(self, batch: Any) -> Any:
        """What the model returns, under whatever autocast there is."""
        return call_model(self._model, to_device(batch, self._device), with_loss=self._loss is not None)
