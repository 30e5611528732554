"""How the parameters of one device are stepped: natively on the CPU and on CUDA, elsewhere by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mlsys_engine.optim.kernels import HYPER_COLUMNS, is_native, step_operator
from mlsys_engine.optim.segments import ArenaSegments, LooseSegments, Row, Segments, total_chunks

if TYPE_CHECKING:
    from mlsys_engine.optim.base import NativeOptimizer


class DeviceStep(Protocol):
    """The part of a step that happens on one device."""

    def is_current(self) -> bool: ...

    def bind(self, gradients: list[Tensor]) -> None:
        """Checks this step's gradients; nothing has changed when it raises."""

    def run(self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor) -> None: ...


class CpuStep:
    """One native call for all parameters on the CPU."""

    def __init__(self, optimizer: NativeOptimizer, rows: Sequence[Row]) -> None:
        self._rows, self._name_of = rows, optimizer.name_of
        self._arena = arena_segments(optimizer, rows)
        self._loose: LooseSegments | None = None
        self.segments: Segments = self._arena or self._loosened()
        self.advance = StepAdvance(optimizer, rows)
        self._parameters = [row.parameter for row in rows]
        self._held: list[Tensor] = []  # this step's gradients: bind may have made copies

    def is_current(self) -> bool:
        return self.segments.is_current()

    def bind(self, gradients: list[Tensor]) -> None:
        if self._arena is not None and self._arena.bind(gradients):
            self.segments = self._arena
            return
        self.segments = loose = self._loosened()
        loose.bind(gradients, self._name_of)
        self._held = gradients

    def run(self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor) -> None:
        if bool(skip):
            return
        self.advance(1.0)
        self.prepare()
        hyper = hyper_table(optimizer)
        for row, column, value in device_hyper(optimizer):
            hyper[row, column] = float(value)
        step_operator(optimizer.rule)(self.segments.table, hyper, self.advance.counts, float(grad_scale))
        self.finish()

    def prepare(self) -> None:
        """Before the kernel: what torch's in-place operations would also have done."""
        torch.autograd.graph.increment_version(self._parameters)
        self.segments.load_staged()

    def finish(self) -> None:
        self.segments.store_staged()
        self._held = []

    def _loosened(self) -> LooseSegments:
        if self._loose is None:
            self._loose = LooseSegments(self._rows)
        return self._loose


class CudaStep:
    """One launch for all parameters on one CUDA device; no value is read back."""

    def __init__(self, optimizer: NativeOptimizer, rows: Sequence[Row]) -> None:
        self._cpu = CpuStep(optimizer, rows)  # the tables are made alike; only their copies travel
        self._device = rows[0].parameter.device
        self._sent: Tensor | None = None
        self._sent_hyper: Tensor | None = None
        self._table = torch.empty(0)
        self._hyper = torch.zeros(
            len(optimizer.param_groups), HYPER_COLUMNS, dtype=torch.float64, device=self._device
        )
        self._control = torch.zeros(2, dtype=torch.float64, device=self._device)

    def is_current(self) -> bool:
        return self._cpu.is_current()

    def bind(self, gradients: list[Tensor]) -> None:
        self._cpu.bind(gradients)
        table = self._cpu.segments.table
        if self._sent is None or not torch.equal(table, self._sent):
            self._sent = table.clone()
            self._table = table.to(self._device)
            self._chunks = total_chunks(table)

    def run(self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor) -> None:
        for slot, value in enumerate((grad_scale, skip)):
            self._control[slot] = value
        hyper = hyper_table(optimizer)
        if self._sent_hyper is None or not torch.equal(hyper, self._sent_hyper):
            self._sent_hyper = hyper
            self._hyper.copy_(hyper)
        for row, column, value in device_hyper(optimizer):
            self._hyper[row, column] = value
        self._cpu.advance(1.0 - self._control[1].float())
        self._cpu.prepare()
        step_operator(optimizer.rule).device(
            self._table, self._hyper, self._cpu.advance.counts, self._control, self._chunks
        )
        self._cpu.finish()


class TorchStep:
    """torch's own implementation, for devices without native kernels. Waits for `skip`."""

    def __init__(self, optimizer: NativeOptimizer, rows: Sequence[Row]) -> None:
        self._rows = rows
        self._gradients: list[Tensor] = []

    def is_current(self) -> bool:
        return True

    def bind(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients

    def run(self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor) -> None:
        gradients, self._gradients = self._gradients, []
        if bool(skip):
            return
        if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
            gradients = [gradient * grad_scale for gradient in gradients]
        for number, group in enumerate(optimizer.param_groups):
            chosen = [index for index, row in enumerate(self._rows) if row.group == number]
            if chosen:
                optimizer.torch_step(
                    group,
                    [self._rows[i].parameter for i in chosen],
                    [gradients[i] for i in chosen],
                    [self._rows[i].step == 0 for i in chosen],
                )


class StepAdvance:
    """Adds to the step counts of the rows' parameters."""

    def __init__(self, optimizer: NativeOptimizer, rows: Sequence[Row]) -> None:
        assert optimizer._steps is not None
        self.counts = optimizer._steps.on(rows[0].parameter.device)
        everyone = len(rows) == len(self.counts)
        self._index = (
            None if everyone else torch.tensor([row.step_index for row in rows], device=self.counts.device)
        )

    def __call__(self, amount: float | Tensor) -> None:
        if self._index is None:
            self.counts += amount
        else:
            self.counts[self._index] += amount


def hyper_table(optimizer: NativeOptimizer) -> Tensor:
    """The groups' hyper-parameters now, one float64 row each, on the CPU; 0 for those on a device."""
    rows = [
        [0.0 if _is_on_device(value) else float(value) for value in optimizer.hyper_row(group)]
        for group in optimizer.param_groups
    ]
    return torch.tensor([row + [0.0] * (HYPER_COLUMNS - len(row)) for row in rows], dtype=torch.float64)


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


def arena_segments(optimizer: NativeOptimizer, rows: Sequence[Row]) -> ArenaSegments | None:
    """The rows as runs of adopted slots, when all of them are adopted."""
    arena_of = {parameter: arena for arena in optimizer._adopted for parameter in arena.order}
    if not all(row.parameter in arena_of for row in rows):
        return None
    names = [optimizer.moment_names(group) for group in optimizer.param_groups]
    return ArenaSegments(rows, arena_of.__getitem__, names)


def make_device_step(optimizer: NativeOptimizer, device: torch.device, rows: Sequence[Row]) -> DeviceStep:
    """The way to step these rows: native where there are kernels for the device, else torch's."""
    if device.type == "cpu":
        return CpuStep(optimizer, rows)
    return (CudaStep if is_native(device) else TorchStep)(optimizer, rows)
