"""Segment tables: the addresses, lengths and hyper-parameter rows that one native step works on.

A table is cached from step to step. Before each use the addresses behind it are compared with the tensors'
present ones, so replaced parameters, moments or gradients are noticed, and a stale address is never followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsys_engine.optim.adopted import AdoptedArena
from mlsys_engine.optim.checks import check_gradient
from mlsys_engine.optim.formats import GRAD_SHIFT, STORED, Form
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS, SEGMENT_COLUMNS

# csrc/optim/segment.h
PARAM_COLUMN, GRAD_COLUMN, MASTER_COLUMN, FIRST_STATE_COLUMN, FIRST_SCALE_COLUMN, EMA_COLUMN = (
    0,
    1,
    2,
    3,
    6,
    9,
)
NUMEL_COLUMN, CHUNK_COLUMN, HYPER_COLUMN, STEP_COLUMN = 10, 11, 12, 13
FORMAT_COLUMN, KEY_COLUMN, FIRST_ELEMENT_COLUMN = 14, 15, 16
MAX_STATES = 3
FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter that takes part in a step."""

    parameter: Tensor
    moments: tuple[Tensor, ...]
    group: int  # row of the hyper-parameter table
    step_index: int  # element of the step counts: the parameter's position in the optimizer
    step: float  # its value now: rows of one segment must agree
    form: Form
    scales: tuple[Tensor | None, ...]  # of moments in eight-bit codes
    master: Tensor | None
    ema: Tensor | None
    key: int  # of its random numbers
    first_element: int = 0  # of a shard, in the whole parameter

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All whose places the table knows, but for the gradient."""
        others = (*self.moments, *self.scales, self.master, self.ema)
        return (self.parameter, *(tensor for tensor in others if tensor is not None))


class LooseSegments:
    """One segment a parameter; the gradients may lie elsewhere at every step."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        # The kernel walks flat memory. A parameter with gaps or repeats (an expanded or strided view) is
        # stepped through a contiguous copy.
        self._staged = [
            (
                row.parameter,
                torch.empty_like(row.parameter, memory_format=torch.contiguous_format),
            )
            for row in rows
            if not is_dense(row.parameter)
        ]
        copies = {id(parameter): copy for parameter, copy in self._staged}
        self._flat = [copies.get(id(row.parameter), row.parameter) for row in rows]
        self._layouts = [(tensor.shape, tensor.stride()) for tensor in self._flat]
        self._own_layouts = [(row.parameter.shape, row.parameter.stride()) for row in rows]
        self._grad_dtypes = [torch.float32] * len(rows)
        self.table = torch.zeros(len(rows), SEGMENT_COLUMNS, dtype=torch.int64)
        self._gradients = self.table.numpy()[:, GRAD_COLUMN]  # numpy's writes cost a tenth of torch's
        self._tensors = [tensor for row in rows for tensor in row.tensors]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        fill_column(self.table, PARAM_COLUMN, self._flat)
        fill_column(self.table, MASTER_COLUMN, [row.master for row in rows])
        fill_column(self.table, EMA_COLUMN, [row.ema for row in rows])
        for state in range(MAX_STATES):
            fill_column(self.table, FIRST_STATE_COLUMN + state, [_item(row.moments, state) for row in rows])
            fill_column(self.table, FIRST_SCALE_COLUMN + state, [_item(row.scales, state) for row in rows])
        self._codes = torch.tensor([row.form.code for row in rows], dtype=torch.int64)
        self.table[:, FORMAT_COLUMN] = self._codes
        self.table[:, KEY_COLUMN] = torch.tensor([row.key for row in rows], dtype=torch.int64)
        self.table[:, FIRST_ELEMENT_COLUMN] = torch.tensor([row.first_element for row in rows])
        fill_lengths(
            self.table,
            list(map(Tensor.numel, self._flat)),
            [row.group for row in rows],
            [row.step_index for row in rows],
        )

    def is_current(self) -> bool:
        """Whether every parameter and moment still lies where the table says."""
        return list(map(Tensor.data_ptr, self._tensors)) == self._addresses and all(
            row.parameter.shape == shape and row.parameter.stride() == stride
            for row, (shape, stride) in zip(self.rows, self._own_layouts, strict=True)
        )

    @property
    def watched(self) -> list[Tensor] | None:
        """What beside parameters must stay for `rebind`; None where these are stepped through copies."""
        return None if self._staged else [tensor for row in self.rows for tensor in row.tensors[1:]]

    def rebind(self, addresses: Tensor) -> bool:
        """Writes the addresses of gradients that are laid out like the last ones that were bound."""
        self._gradients[:] = addresses.numpy()
        return True

    def bind(self, gradients: list[Tensor], name_of: Callable[[Tensor], str]) -> None:
        """Writes the gradients' addresses; gradients of another layout are replaced in the list by copies."""
        if not self._all_match(gradients):
            for index, (row, flat, gradient) in enumerate(zip(self.rows, self._flat, gradients, strict=True)):
                check_gradient(gradient, row.parameter, name_of(row.parameter))
                if gradient.stride() != flat.stride() or gradient.is_neg():
                    gradients[index] = torch.empty_like(flat, dtype=gradient.dtype).copy_(gradient)
            self._grad_dtypes = [gradient.dtype for gradient in gradients]
            stored = torch.tensor([int(STORED[dtype]) for dtype in self._grad_dtypes], dtype=torch.int64)
            self.table[:, FORMAT_COLUMN] = self._codes | (stored << GRAD_SHIFT)
        self._gradients[:] = list(map(Tensor.data_ptr, gradients))

    def _all_match(self, gradients: list[Tensor]) -> bool:
        # One pass, since with thousands of tensors fetching each object from memory is what costs.
        device = self._flat[0].device  # of all rows
        try:
            for gradient, (shape, stride), dtype in zip(
                gradients, self._layouts, self._grad_dtypes, strict=True
            ):
                if (
                    gradient.stride() != stride
                    or gradient.shape
                    != shape  # torch holds it to the parameter's, which may since be another
                    or gradient.dtype is not dtype
                    or gradient.device != device
                    or gradient.is_neg()
                ):
                    return False
        except RuntimeError:  # a sparse gradient has no strides
            return False
        return True

    def load_staged(self) -> None:
        for parameter, copy in self._staged:
            copy.copy_(parameter)

    def store_staged(self) -> None:
        for parameter, copy in self._staged:
            parameter.copy_(copy)


class ArenaSegments:
    """Runs of neighbouring slots of adopted arenas, each one segment; a whole arena when nothing divides it.

    The padding between slots is stepped along with them: it is zero everywhere and stays zero.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        arena_of: Callable[[Tensor], AdoptedArena],
        moment_names: Sequence[Sequence[str]],
    ) -> None:
        self.rows = rows
        placed = [(arena_of(row.parameter), row) for row in rows]
        self._expected = [arena.grads.view(arena.slot(row.parameter)).data_ptr() for arena, row in placed]
        self._expected_table = torch.tensor(self._expected, dtype=torch.int64)
        # The moments' memory is the arenas' own and cannot go away.
        self.watched: list[Tensor] | None = []
        self._addresses = [row.parameter.data_ptr() for row in rows]
        arenas = {id(arena): number for number, (arena, _) in enumerate(placed)}
        placed.sort(key=lambda pair: (arenas[id(pair[0])], pair[0].order[pair[1].parameter]))
        runs: list[list[tuple[AdoptedArena, Row]]] = []
        for arena, row in placed:
            if runs and _continues(runs[-1][-1], (arena, row)):
                runs[-1].append((arena, row))
            else:
                runs.append([(arena, row)])
        self.table = torch.zeros(len(runs), SEGMENT_COLUMNS, dtype=torch.int64)
        lengths = []
        for index, run in enumerate(runs):
            arena, first = run[0]
            begin, end = arena.slot(first.parameter).offset, arena.slot(run[-1][1].parameter).end
            moments = [arena.moments(name) for name in moment_names[first.group]]
            columns = [
                PARAM_COLUMN,
                GRAD_COLUMN,
                *range(FIRST_STATE_COLUMN, FIRST_STATE_COLUMN + len(moments)),
            ]
            for column, home in zip(columns, [arena.params, arena.grads, *moments], strict=True):
                self.table[index, column] = home.data.data_ptr() + begin * FLOAT_BYTES
            lengths.append(end - begin)
        fill_lengths(
            self.table, lengths, [run[0][1].group for run in runs], [run[0][1].step_index for run in runs]
        )

    def is_current(self) -> bool:
        """Whether every parameter is still its view of the arenas."""
        return [row.parameter.data_ptr() for row in self.rows] == self._addresses

    def bind(self, gradients: list[Tensor]) -> bool:
        """Whether all gradients are the arenas' views; if not, they must be stepped as loose ones."""
        return list(map(Tensor.data_ptr, gradients)) == self._expected

    def rebind(self, addresses: Tensor) -> bool:
        """`bind` of gradients whose addresses have been read."""
        return torch.equal(addresses, self._expected_table)

    def load_staged(self) -> None:
        """Nothing: slots are contiguous."""

    def store_staged(self) -> None:
        """Nothing: slots are contiguous."""


Segments = LooseSegments | ArenaSegments


def fill_lengths(table: Tensor, lengths: Sequence[int], groups: Sequence[int], steps: Sequence[int]) -> None:
    """Fills the columns after the addresses. Chunks count up through the table (csrc/optim/segment.h)."""
    numel = torch.tensor(lengths, dtype=torch.int64)
    chunks = (numel + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS
    table[:, NUMEL_COLUMN] = numel
    table[:, CHUNK_COLUMN] = chunks.cumsum(0) - chunks
    table[:, HYPER_COLUMN] = torch.tensor(groups, dtype=torch.int64)
    table[:, STEP_COLUMN] = torch.tensor(steps, dtype=torch.int64)


def fill_column(table: Tensor, column: int, tensors: Sequence[Tensor | None]) -> None:
    """Writes the tensors' addresses, 0 for None."""
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    table[:, column] = torch.tensor(addresses, dtype=torch.int64)


def total_chunks(table: Tensor) -> int:
    """The number of chunks in all segments of a table."""
    if len(table) == 0:
        return 0
    return int(table[-1, CHUNK_COLUMN]) + -(-int(table[-1, NUMEL_COLUMN]) // CHUNK_ELEMENTS)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills one stretch of memory exactly, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _continues(previous: tuple[AdoptedArena, Row], current: tuple[AdoptedArena, Row]) -> bool:
    (arena, before), (other, row) = previous, current
    return (
        arena is other
        and other.order[row.parameter] == arena.order[before.parameter] + 1
        and row.group == before.group
        and row.step == before.step
    )


def _item(tensors: Sequence[Tensor | None], index: int) -> Tensor | None:
    return tensors[index] if index < len(tensors) else None
