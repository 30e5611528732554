"""The state of a native optimizer for one rank's shard of an arena, and the table that steps it.

The optimizer object keeps its groups, so that schedules and hyper-parameters work as ever; its moments live
here, for the owned ranges alone. A rule works element by element, so a shard of a parameter steps as the
whole does, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlsys_engine.comm import RuleTable
from mlsys_engine.errors import CheckpointError
from mlsys_engine.memory.flat_arena import FlatArena, Slot
from mlsys_engine.memory.flat_shard import FlatShard
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.kernels import SEGMENT_COLUMNS
from mlsys_engine.optim.operands import hyper_table, sent
from mlsys_engine.optim.segments import (
    FIRST_STATE_COLUMN,
    FLOAT_BYTES,
    GRAD_COLUMN,
    PARAM_COLUMN,
    fill_lengths,
)

Gather = Callable[[Tensor], None]  # makes an arena-sized tensor whole, of which each rank has its own ranges


@dataclass(frozen=True, kw_only=True)
class _Owned:
    """What this rank owns of one parameter."""

    parameter: Tensor
    slot: Slot
    group: int
    step_index: int  # position among the optimizer's parameters
    first: int  # elements of the parameter, [first, end)
    end: int
    base: int  # where its first owned element lies in a flat moment
    range: int  # which of the rank's ranges it lies in

    @property
    def arena_first(self) -> int:
        return self.slot.offset + self.first


class OptimizerShard:
    """Moments of the ranges of `params` that this rank owns (ascending, in elements); all step counts.

    Both lie on the device of `params`. `grads` has the layout of `params`.
    """

    def __init__(
        self,
        optimizer: NativeOptimizer,
        params: FlatArena,
        grads: FlatArena,
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        self.optimizer, self.params, self.grads = optimizer, params, grads
        self.parameters = optimizer._parameters()
        self.steps = torch.zeros(len(self.parameters), dtype=torch.float32, device=params.data.device)
        self._num_owned = sum(end - first for first, end in ranges)
        self._moments: dict[str, Tensor] = {}
        self._names = [name for name, _ in _placed(optimizer, params)]
        self._owned = _owned(optimizer, params, ranges)
        self._ranges = tuple(ranges)
        self._segments: dict[int | None, Tensor] = {}
        self._segments_key: Any = None
        self._used = _Used(self.parameters, self.steps.device)

    def advance(self, amount: float | Tensor = 1.0) -> None:
        """Counts a step of the parameters that have a gradient; `amount` 0 makes it a skipped one."""
        self.steps += self._used.mask() * amount

    def table(self) -> RuleTable:
        """What the present step needs, on the CPU: parameters without a gradient are left out."""
        return RuleTable(
            rule=self.optimizer.rule,
            segments=self.segments(),
            hyper=hyper_table(self.optimizer),
            steps=self.steps,
            keep_alive=tuple(self._moments.values()),
        )

    def segments(self, number: int | None = None) -> Tensor:
        """The present step's rows of csrc/optim/segment.h, of range `number` or of all."""
        used = self._used.flags()
        needs = tuple(self.optimizer.moment_names(group) for group in self.optimizer.param_groups)
        # Neighbours share a row while they agree on their steps, which can change when the used ones do.
        if self._segments_key != (used, needs):
            self._segments_key, self._segments = (used, needs), {}
        if number not in self._segments:
            self._segments[number] = self._build(used, needs, number)
        return self._segments[number]

    def moment(self, name: str) -> Tensor:
        """The owned ranges of a moment, one after another; zero-filled at the first call."""
        if name not in self._moments:
            self._moments[name] = torch.zeros(self._num_owned, dtype=torch.float32, device=self.steps.device)
        return self._moments[name]

    def state(self, gather: Gather | None = None) -> dict[str, dict[str, Any]]:
        """State by parameter name, of parameters that have stepped: with `gather` whole, else FlatShards.

        Every rank has the same keys, also where it owns nothing of a parameter.
        """
        wholes = {name: self._whole(name, gather) for name in self._moments} if gather is not None else {}
        result = {}
        for name, owned in zip(self._names, self._owned, strict=True):
            if not self.steps[owned.step_index]:
                continue
            values: dict[str, Any] = (
                {"step": self.steps[owned.step_index]} if self.optimizer.counts_steps else {}
            )
            for moment in self.optimizer.moment_names(self.optimizer.param_groups[owned.group]):
                if moment in wholes:
                    slot = owned.slot
                    values[moment] = wholes[moment][slot.offset : slot.end].view(slot.shape).clone()
                else:
                    values[moment] = self._part(owned, moment)
            result[name] = values
        return result

    def place(self, name: str, moment: str) -> FlatShard | None:
        """Where a checkpoint's piece of state belongs; None for what is not sharded."""
        for own_name, owned in zip(self._names, self._owned, strict=True):
            if own_name == name and moment in self.optimizer.moment_names(
                self.optimizer.param_groups[owned.group]
            ):
                return self._part(owned, moment)
        return None

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over state by parameter name, whole or as this rank's FlatShards; what is missing is zero."""
        for name, owned in zip(self._names, self._owned, strict=True):
            values = dict(state.get(name, {}))
            moments = self.optimizer.moment_names(self.optimizer.param_groups[owned.group])
            present = any(values.get(moment) is not None for moment in moments)
            if self.optimizer.counts_steps:
                if present and values.get("step") is None:
                    raise CheckpointError(
                        f"The optimizer state of {name} has {', '.join(moments)} but no step count.",
                        'state["step"] is expected, as torch.optim saves it.',
                        "Load a state dictionary of this optimizer or of its torch counterpart.",
                    )
                self.steps[owned.step_index] = float(values.get("step", 0.0))
            else:
                self.steps[owned.step_index] = float(present)
            for moment in moments:
                _copy(name, moment, values.get(moment), self._part(owned, moment))
        self._segments_key = None

    def _part(self, owned: _Owned, moment: str) -> FlatShard:
        numel = owned.end - owned.first
        data = self.moment(moment)[owned.base : owned.base + numel]
        return FlatShard(shape=torch.Size(owned.slot.shape), first=owned.first, data=data)

    def _whole(self, name: str, gather: Gather) -> Tensor:
        flat = torch.zeros_like(self.params.data)
        base = 0
        for first, end in self._ranges:
            flat[first:end] = self._moments[name][base : base + end - first]
            base += end - first
        gather(flat)
        return flat

    def _build(self, used: Sequence[bool], needs: Sequence[Sequence[str]], number: int | None) -> Tensor:
        """Runs of neighbours of one group and one step count."""
        steps = self.steps.tolist()
        runs: list[list[_Owned]] = []
        for owned in self._owned:
            if not used[owned.step_index] or owned.first == owned.end or number not in (None, owned.range):
                continue
            if runs and _continues(runs[-1][-1], owned, steps):
                runs[-1].append(owned)
            else:
                runs.append([owned])
        table = torch.zeros(len(runs), SEGMENT_COLUMNS, dtype=torch.int64)
        lengths = []
        for index, run in enumerate(runs):
            first, last = run[0], run[-1]
            table[index, PARAM_COLUMN] = self.params.data.data_ptr() + first.arena_first * FLOAT_BYTES
            table[index, GRAD_COLUMN] = self.grads.data.data_ptr() + first.arena_first * FLOAT_BYTES
            for column, moment in enumerate(needs[first.group]):
                address = self.moment(moment).data_ptr() + first.base * FLOAT_BYTES
                table[index, FIRST_STATE_COLUMN + column] = address
            lengths.append(last.slot.offset + last.end - first.arena_first)
        fill_lengths(table, lengths, [run[0].group for run in runs], [run[0].step_index for run in runs])
        return table


class _Used:
    """Which parameters have a gradient now."""

    def __init__(self, parameters: Sequence[Tensor], device: torch.device) -> None:
        self._parameters, self._device = parameters, device
        self._mask: tuple[tuple[bool, ...], Tensor] | None = None

    def flags(self) -> tuple[bool, ...]:
        return tuple(parameter.grad is not None for parameter in self._parameters)

    def mask(self) -> Tensor:
        """The flags as float32 on the device, sent again only when they have changed."""
        flags = self.flags()
        if self._mask is None or self._mask[0] != flags:
            self._mask = flags, sent(torch.tensor(flags, dtype=torch.float32), self._device)
        return self._mask[1]


def _continues(before: _Owned, owned: _Owned, steps: Sequence[float]) -> bool:
    # The same distance in the arena and in the moments: nothing but padding lies between, which is zero
    # everywhere and stays zero.
    return (
        owned.arena_first - before.arena_first == owned.base - before.base
        and before.end == before.slot.numel
        and owned.first == 0
        and owned.slot.offset - before.slot.end < SEGMENT_PADDING
        and owned.group == before.group
        and steps[owned.step_index] == steps[before.step_index]
    )


SEGMENT_PADDING = 16  # elements: slots begin on 64 bytes, so less than this lies between neighbours


def _placed(optimizer: NativeOptimizer, params: FlatArena) -> list[tuple[str, tuple[Tensor, Slot, int, int]]]:
    """(name, (parameter, slot, group, position)) of the optimizer's parameters, in the order of the arena."""
    by_address = {params.view(slot).data_ptr(): slot for slot in params.slots if slot.numel}
    by_name = {slot.name: slot for slot in params.slots}
    names = optimizer._names()
    placed, position = [], 0
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            slot = by_name.get(names.get(parameter, "")) or by_address.get(parameter.data_ptr())
            if slot is not None and slot.shape == parameter.shape:
                placed.append((slot.name, (parameter, slot, number, position)))
            position += 1
    return sorted(placed, key=lambda item: item[1][1].offset)


def _owned(optimizer: NativeOptimizer, params: FlatArena, ranges: Sequence[tuple[int, int]]) -> list[_Owned]:
    """What this rank owns of each parameter, which is at most one range: a parameter lies in one bucket."""
    result, current, base = [], 0, 0
    for _, (parameter, slot, group, position) in _placed(optimizer, params):
        while current < len(ranges) and ranges[current][1] <= slot.offset:
            base += ranges[current][1] - ranges[current][0]
            current += 1
        first = end = 0
        start = base
        if current < len(ranges) and slot.numel:
            low, high = ranges[current]
            first = min(max(low - slot.offset, 0), slot.numel)
            end = max(min(high - slot.offset, slot.numel), first)
            start = base + slot.offset + first - low if first < end else base
        if first == end:
            first = end = 0
        result.append(
            _Owned(
                parameter=parameter,
                slot=slot,
                group=group,
                step_index=position,
                first=first,
                end=end,
                base=start,
                range=current,
            )
        )
    return result


def _copy(name: str, moment: str, value: Any, home: FlatShard) -> None:
    if value is None:
        home.data.zero_()
        return
    if tuple(value.shape) != tuple(home.shape):
        raise CheckpointError(
            f"The optimizer state {moment} of {name} has shape {tuple(value.shape)}.",
            f"{tuple(home.shape)} is expected, like its parameter.",
            "Load the state that was saved with this model.",
        )
    if not isinstance(value, FlatShard):
        home.data.copy_(home.take(value))
        return
    if (value.first, value.end) != (home.first, home.end):
        raise CheckpointError(
            f"The optimizer state {moment} of {name} holds elements {value.first} to {value.end}.",
            f"This rank owns {home.first} to {home.end}.",
            "Load state_dict(full=True), or a checkpoint, which go to any layout.",
        )
    if value.data.data_ptr() != home.data.data_ptr():
        home.data.copy_(value.data)
