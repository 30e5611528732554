"""A StepPlan: everything about a step that stays the same until parameters, groups or state change."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mlsys_engine.native import load_tensors
from mlsys_engine.optim import distributed
from mlsys_engine.optim.device_steps import make_device_step
from mlsys_engine.optim.state import ensure_state

if TYPE_CHECKING:
    from mlsys_engine.optim.base import NativeOptimizer


class StepPlan:
    """Which parameters step, on which device, from which segment tables."""

    def __init__(self, optimizer: NativeOptimizer, params: list[Tensor], missing: list[bool]) -> None:
        positions = [position for position, is_missing in enumerate(missing) if not is_missing]
        rows = ensure_state(optimizer, params, positions)
        # Rows that are DTensors themselves, and not this rank's shards, are torch's to step.
        from_device: dict[tuple[torch.device, bool], list[int]] = {}
        for index, row in enumerate(rows):
            place = row.parameter.device, distributed.is_sharded(row.parameter)
            from_device.setdefault(place, []).append(index)
        self._parts = [
            (
                indices if len(from_device) > 1 else None,
                make_device_step(optimizer, [rows[index] for index in indices]),
            )
            for indices in from_device.values()
        ]
        self._params, self._missing = params, missing
        self._sharded = [
            (index, params[position], rows[index].parameter.data_ptr())
            for index, position in enumerate(positions)
            if rows[index].parameter is not params[position]
        ]
        self._shape = shape_of_groups(optimizer)
        self._adopted = optimizer._adopted
        self._state = optimizer.state
        self._states = list(optimizer.state.values())
        # Only what some state has is compared: of thousands of states each key costs a look at all.
        names = {name for shape in self._shape for name in shape.moments}
        others = (
            name for state in self._states for name, value in state.items() if isinstance(value, Tensor)
        )
        self._keys = sorted(names.union(others, ("step",) if optimizer.counts_steps else ()))
        self._tensors = {key: [state.get(key) for state in self._states] for key in self._keys}
        self._has_run = False
        self._watch: Any = None  # native: knows what the last step was built from

    def is_current(self, optimizer: NativeOptimizer, params: list[Tensor], missing: list[bool]) -> bool:
        """Whether the same parameters step, in the same groups, with the same state at the same places."""
        return (
            missing == self._missing
            and same(params, self._params)
            and shape_of_groups(optimizer) == self._shape
            and optimizer._adopted is self._adopted
            and optimizer.state is self._state
            and same(list(optimizer.state.values()), self._states)
            and all(
                same([state.get(key) for state in self._states], self._tensors[key]) for key in self._keys
            )
            and all(part.is_current() for _, part in self._parts)
            and all(
                distributed.local(parameter).data_ptr() == address for _, parameter, address in self._sharded
            )
        )

    def run(
        self,
        optimizer: NativeOptimizer,
        gradients: list[Tensor],
        grad_scale: float | Tensor,
        skip: bool | Tensor,
        zero_grad: bool,
    ) -> None:
        """Steps all parameters; `gradients` are those of the present ones, in order."""
        for index, parameter, _ in self._sharded:
            gradients[index] = distributed.local_gradient(parameter, gradients[index], optimizer.name_of)
            torch.autograd.graph.increment_version(parameter)
        for indices, part in self._parts:
            part.bind(gradients if indices is None else [gradients[index] for index in indices])
        # Not at the first step: where parameters take turns in having gradients, plans live for one.
        self._watch = self._watched(gradients) if self._has_run else None
        self._has_run = True
        for _, part in self._parts:
            part.run(optimizer, grad_scale, skip, zero_grad)

    def repeat(
        self, optimizer: NativeOptimizer, grad_scale: float | Tensor, skip: bool | Tensor, zero_grad: bool
    ) -> bool:
        """Steps on the parameters' own gradients, which may be new ones, if nothing else has changed.

        One native look at all tensors, instead of the many questions of `is_current` and `run`. False, with
        nothing done, where something may have changed, or is more than the look can judge.
        """
        if (
            self._watch is None
            or optimizer._adopted is not self._adopted
            or optimizer.state is not self._state
            or shape_of_groups(optimizer) != self._shape
            or not self._watch.look([group["params"] for group in optimizer.param_groups])
        ):
            return False
        ((_, part),) = self._parts
        can_step = part.rebind(self._watch.addresses)
        if can_step:
            part.run(optimizer, grad_scale, skip, zero_grad)
        self._watch.release()  # it has kept the gradients' memory until here
        return can_step

    def _watched(self, gradients: list[Tensor]) -> Any:
        """What tells that `repeat` may step; None where it never may."""
        watched = self._parts[0][1].watched if len(self._parts) == 1 and not self._sharded else None
        if watched is None:
            return None
        present = iter(gradients)
        return load_tensors().watch(
            params=self._params,
            gradients=[None if is_missing else next(present) for is_missing in self._missing],
            watched=watched,
            state=self._state,
        )


class _GroupShape(NamedTuple):
    """What decides which state a group's parameters have."""

    num_params: int
    moments: tuple[str, ...]
    precision: tuple[object, ...]


def shape_of_groups(optimizer: NativeOptimizer) -> list[_GroupShape]:
    return [
        _GroupShape(
            len(group["params"]),
            optimizer.moment_names(group),
            (group["master"], group["moments"], group["ema"] is None, group["seed"]),
        )
        for group in optimizer.param_groups
    ]


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))
