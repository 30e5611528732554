"""What a step is launched with: hyper-parameter rows, and the copies of tables and scalars on a device.

A device's copies are sent again only when they have changed, and nothing is read back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlsys_engine.optim.kernels import EMA_DECAY_COLUMN, HYPER_COLUMNS, step_operator
from mlsys_engine.optim.segments import total_chunks

if TYPE_CHECKING:
    from mlsys_engine.optim.base import NativeOptimizer


class SentTable:
    """A segment table and its copy on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: Tensor | None = None
        self.on_device = torch.empty(0)
        self.num_chunks = 0

    def send(self, table: Tensor) -> None:
        """Makes the copy that of `table`, which may change afterwards."""
        if self._sent is None or not torch.equal(table, self._sent):
            self._sent = table.clone()
            self.on_device = sent(self._sent, self._device)
            self.num_chunks = total_chunks(table)


class DeviceLaunch:
    """Steps segment tables by an optimizer's rule on one device: `prepare`, then a call for each table."""

    def __init__(self, optimizer: NativeOptimizer, device: torch.device) -> None:
        self._operator = step_operator(optimizer.rule).device
        self._sent_hyper: Tensor | None = None
        self._hyper = torch.zeros(
            len(optimizer.param_groups), HYPER_COLUMNS, dtype=torch.float64, device=device
        )
        self._control = torch.zeros(2, dtype=torch.float64, device=device)  # csrc/optim/launch.h

    def prepare(self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor) -> None:
        """Takes this step's scalars; those on the device are not waited for."""
        for slot, value in enumerate((grad_scale, skip)):
            self._control[slot] = value
        hyper = hyper_table(optimizer)
        if self._sent_hyper is None or not torch.equal(hyper, self._sent_hyper):
            self._sent_hyper = hyper
            self._hyper.copy_(sent(hyper, self._hyper.device))
        for row, column, value in device_hyper(optimizer):
            self._hyper[row, column] = value

    @property
    def num_counted(self) -> Tensor:
        """What step counts advance by: 1, or 0 where this step is skipped. 0-d float32 on the device."""
        return 1.0 - self._control[1].float()

    def __call__(self, table: SentTable, counts: Tensor) -> None:
        self._operator(table.on_device, self._hyper, counts, self._control, table.num_chunks)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The CPU's values on a device. They go from pinned memory, so that the host does not wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def hyper_table(optimizer: NativeOptimizer) -> Tensor:
    """The groups' hyper-parameters now, one float64 row each, on the CPU; 0 for those on a device."""
    rows = [
        [0.0 if _is_on_device(value) else float(value) for value in optimizer.hyper_row(group)]
        for group in optimizer.param_groups
    ]
    table = torch.tensor([row + [0.0] * (HYPER_COLUMNS - len(row)) for row in rows], dtype=torch.float64)
    for index, group in enumerate(optimizer.param_groups):
        if group["ema"] is not None:
            table[index, EMA_DECAY_COLUMN] = group["ema"]
    return table


def read_hyper(optimizer: NativeOptimizer) -> Tensor:
    """hyper_table with the values of those on a device, which are waited for."""
    table = hyper_table(optimizer)
    for row, column, value in device_hyper(optimizer):
        table[row, column] = float(value)
    return table


def device_hyper(optimizer: NativeOptimizer) -> list[tuple[int, int, Tensor]]:
    """(row, column, value) of the hyper-parameters that live on a device and must not be waited for."""
    return [
        (row, column, value)
        for row, group in enumerate(optimizer.param_groups)
        for column, value in enumerate(optimizer.hyper_row(group))
        if isinstance(value, Tensor) and _is_on_device(value)
    ]


def _is_on_device(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"
