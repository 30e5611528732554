"""How the parameters of one device are stepped: natively on the CPU and on CUDA, elsewhere by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mlsys_engine.errors import ConfigError
from mlsys_engine.native import load_tensors
from mlsys_engine.optim.distributed import is_sharded
from mlsys_engine.optim.formats import ZERO_GRAD
from mlsys_engine.optim.kernels import is_native, step_operator
from mlsys_engine.optim.operands import DeviceLaunch, SentTable, read_hyper
from mlsys_engine.optim.segments import FORMAT_COLUMN, ArenaSegments, LooseSegments, Row, Segments

if TYPE_CHECKING:
    from mlsys_engine.optim.base import NativeOptimizer


class DeviceStep(Protocol):
    """The part of a step that happens on one device."""

    def is_current(self) -> bool: ...

    def bind(self, gradients: list[Tensor]) -> None:
        """Checks this step's gradients; nothing has changed when it raises."""

    @property
    def watched(self) -> list[Tensor] | None:
        """What beside parameters must stay where it is for `rebind`; None where more must be known."""

    def rebind(self, addresses: Tensor) -> bool:
        """Binds gradients of the layout and types of the last ones; int64 on the CPU, as is their order."""

    def run(
        self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool
    ) -> None: ...


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

    @property
    def watched(self) -> list[Tensor] | None:
        # Gradients that have left their arena may come back to it.
        return self.segments.watched if self._arena in {None, self.segments} else None

    def rebind(self, addresses: Tensor) -> bool:
        return self.segments.rebind(addresses)

    def run(
        self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool
    ) -> None:
        if not bool(skip):
            self.launch(optimizer, read_hyper(optimizer), float(grad_scale), zero_grad)

    def launch(self, optimizer: NativeOptimizer, hyper: Tensor, grad_scale: float, zero_grad: bool) -> None:
        """The step with hyper-parameter rows that the caller has read."""
        self.advance(1.0)
        self.prepare()
        table = zeroing(self.segments.table) if zero_grad else self.segments.table
        step_operator(optimizer.rule)(table, hyper, self.advance.counts, grad_scale)
        self.finish()

    def prepare(self) -> None:
        """Before the kernel: what torch's in-place operations would also have done."""
        load_tensors().increment_versions(self._parameters)
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
        device = rows[0].parameter.device
        self._launch, self._table = DeviceLaunch(optimizer, device), SentTable(device)

    def is_current(self) -> bool:
        return self._cpu.is_current()

    def bind(self, gradients: list[Tensor]) -> None:
        self._cpu.bind(gradients)

    @property
    def watched(self) -> list[Tensor] | None:
        return self._cpu.watched

    def rebind(self, addresses: Tensor) -> bool:
        return self._cpu.rebind(addresses)

    def run(
        self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool
    ) -> None:
        table = self._cpu.segments.table
        self._table.send(zeroing(table) if zero_grad else table)
        self._launch.prepare(optimizer, grad_scale, skip)
        self._cpu.advance(self._launch.num_counted)
        self._cpu.prepare()
        self._launch(self._table, self._cpu.advance.counts)
        self._cpu.finish()


class TorchStep:
    """torch's own implementation, for devices without native kernels. Waits for `skip`."""

    def __init__(self, optimizer: NativeOptimizer, rows: Sequence[Row]) -> None:
        if any(not row.form.is_plain for row in rows):
            raise ConfigError(
                f"{type(optimizer).__name__} has more than float32 parameters and moments on "
                f"{rows[0].parameter.device}.",
                "This build has no kernels for that device, and torch's own step knows only float32.",
                'Keep the model in float32 with moments="fp32" and ema=None there.',
            )
        self._rows = rows
        self._fresh = [row.step == 0 for row in rows]
        self._gradients: list[Tensor] = []

    def is_current(self) -> bool:
        return True

    def bind(self, gradients: list[Tensor]) -> None:
        self._gradients = gradients

    @property
    def watched(self) -> list[Tensor] | None:
        return None

    def rebind(self, addresses: Tensor) -> bool:
        return False

    def run(
        self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool
    ) -> None:
        gradients, self._gradients = self._gradients, []
        if bool(skip):
            return
        held = gradients
        if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
            gradients = [gradient * grad_scale for gradient in gradients]
        for number, group in enumerate(optimizer.param_groups):
            chosen = [index for index, row in enumerate(self._rows) if row.group == number]
            if chosen:
                optimizer.torch_step(
                    group,
                    [self._rows[i].parameter for i in chosen],
                    [gradients[i] for i in chosen],
                    [self._fresh[i] for i in chosen],
                )
        self._fresh = [False] * len(self._rows)
        if zero_grad:
            torch._foreach_zero_(held)


class StepAdvance:
    """Adds to the step counts of the rows' parameters."""

    def __init__(self, optimizer: NativeOptimizer, rows: Sequence[Row]) -> None:
        assert optimizer._steps is not None
        self.counts = optimizer._steps.on(rows[0].parameter.device)
        self._index: Tensor | None = None
        self._view = self.counts  # of those to advance, when a view can be had
        if len(rows) == 1:
            self._view = self.counts[rows[0].step_index]
        elif len(rows) != len(self.counts):
            self._index = torch.tensor([row.step_index for row in rows], device=self.counts.device)

    def __call__(self, amount: float | Tensor) -> None:
        if self._index is None:
            self._view += amount
        else:
            self.counts[self._index] += amount


def arena_segments(optimizer: NativeOptimizer, rows: Sequence[Row]) -> ArenaSegments | None:
    """The rows as runs of adopted slots, when all of them are adopted and plain float32.

    Rules that need whole tensors have a segment a tensor, wherever it lies.
    """
    if not optimizer.elementwise:
        return None
    arena_of = {parameter: arena for arena in optimizer._adopted for parameter in arena.order}
    if not all(row.parameter in arena_of and row.form.is_plain for row in rows):
        return None
    names = [optimizer.moment_names(group) for group in optimizer.param_groups]
    return ArenaSegments(rows, arena_of.__getitem__, names)


def zeroing(table: Tensor) -> Tensor:
    """The table with gradients that are zeroed after they were read."""
    table = table.clone()
    table[:, FORMAT_COLUMN] |= ZERO_GRAD
    return table


def make_device_step(optimizer: NativeOptimizer, rows: Sequence[Row]) -> DeviceStep:
    """The way to step these rows of one device: native where there are kernels for it, else torch's."""
    device = rows[0].parameter.device
    if not is_native(device) or is_sharded(rows[0].parameter):
        return TorchStep(optimizer, rows)
    return (CpuStep if device.type == "cpu" else CudaStep)(optimizer, rows)
