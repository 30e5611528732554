"""The optimizer's state tensors: created at a parameter's first step, laid out as its kernel needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlsys_engine.errors import CheckpointError
from mlsys_engine.memory.flat_arena import FlatArena, layout_slots
from mlsys_engine.optim import distributed
from mlsys_engine.optim.kernels import is_native
from mlsys_engine.optim.segments import Row, is_dense

if TYPE_CHECKING:
    from mlsys_engine.optim.base import NativeOptimizer


class StepCounts:
    """One float32 count a parameter, in one tensor a device, so that thousands advance by one addition.

    `state[p]["step"]` is a view of an element, in the form that torch's optimizers save.
    """

    def __init__(self, num_params: int) -> None:
        self.num_params = num_params
        self._counts: dict[torch.device, Tensor] = {}
        self._views: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, device: torch.device) -> Tensor:
        """The counts of all positions, of which those of parameters on `device` are used."""
        if device not in self._counts:
            self._counts[device] = torch.zeros(self.num_params, dtype=torch.float32, device=device)
            self._views[device] = self._counts[device].unbind()
        return self._counts[device]

    def view(self, device: torch.device, position: int) -> Tensor:
        self.on(device)
        return self._views[device][position]


def ensure_state(optimizer: NativeOptimizer, params: Sequence[Tensor], positions: Sequence[int]) -> list[Row]:
    """Creates or lays out the state of the parameters at `positions`; returns their segment table rows."""
    if optimizer._steps is None or optimizer._steps.num_params != len(params):
        optimizer._steps = StepCounts(len(params))
    counts = optimizer._steps
    needs = [optimizer.moment_names(group) for group in optimizer.param_groups]
    group_of = [number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    # As torch: a rule without state leaves no empty entries behind.
    states = [
        optimizer.state[params[i]] if optimizer.counts_steps or needs[group_of[i]] else {} for i in positions
    ]
    before = {device: counts.on(device).tolist() for device in {params[i].device for i in positions}}
    steps = []
    for position, state in zip(positions, states, strict=True):
        view = counts.view(params[position].device, position)
        current = before[params[position].device][position]
        steps.append(_made_steps(optimizer, state, view, needs[group_of[position]], current))
        if steps[-1] != current:
            view.fill_(steps[-1])
        if optimizer.counts_steps:
            state["step"] = view
    # A DTensor is stepped by this rank's shard; its state holds DTensors around the moments' shards.
    keys = [needs[group_of[i]] for i in positions]
    homes = [distributed.local(params[i]) for i in positions]
    shards = [
        distributed.local_state(params[i], state, names, optimizer.name_of)
        for i, state, names in zip(positions, states, keys, strict=True)
    ]
    moments = _moments(optimizer, homes, keys, shards)
    for i, state, names, own in zip(positions, states, keys, shards, strict=True):
        distributed.store_state(params[i], state, names, own)
    return [
        Row(
            parameter=home if is_native(home.device) else params[i],  # torch's own step knows DTensors
            moments=own,
            group=group_of[i],
            step_index=i,
            step=step,
        )
        for i, home, own, step in zip(positions, homes, moments, steps, strict=True)
    ]


def _made_steps(
    optimizer: NativeOptimizer, state: dict[str, Any], view: Tensor, names: Sequence[str], current: float
) -> float:
    """How many steps this parameter has made: by its own state, which may be new, loaded, or edited."""
    if not optimizer.counts_steps:
        # Only "was there a step before" matters, and the moments tell: as in torch, none or None means no.
        return max(current, 1.0) if any(state.get(name) is not None for name in names) else 0.0
    saved = state.get("step")
    if saved is view:
        return current
    if saved is None and any(state.get(name) is not None for name in names):
        raise CheckpointError(
            f"The optimizer state has {', '.join(names)} but no step count.",
            'state["step"] is expected, as torch.optim saves it.',
            "Load a state dictionary of this optimizer or of its torch counterpart.",
        )
    return 0.0 if saved is None else float(saved)


def _moments(
    optimizer: NativeOptimizer,
    params: Sequence[Tensor],
    needs: Sequence[Sequence[str]],
    states: Sequence[dict[str, Any]],
) -> list[tuple[Tensor, ...]]:
    """Each parameter's moments, in the adopted arenas if there are some, else laid out like the parameter."""
    arena_of = {parameter: arena for arena in optimizer._adopted for parameter in arena.order}
    new: dict[str, list[tuple[Tensor, dict[str, Any]]]] = {}
    for parameter, names, state in zip(params, needs, states, strict=True):
        for name in names:
            current, arena = state.get(name), arena_of.get(parameter)
            if current is not None and current.shape != parameter.shape:
                raise CheckpointError(
                    f"The optimizer state {name} has shape {tuple(current.shape)}.",
                    f"{tuple(parameter.shape)} is expected, like its parameter.",
                    "Load the state that was saved with this model.",
                )
            if arena is not None:
                state[name] = _moved(current, arena.moment(parameter, name))
            elif current is None:
                new.setdefault(name, []).append((parameter, state))
            elif not _fits(current, parameter):
                state[name] = torch.empty_strided(
                    parameter.shape, _strides_for(parameter), device=parameter.device
                ).copy_(current)
    for name, owners in new.items():
        _create(name, owners)
    return [tuple(state[name] for name in names) for names, state in zip(needs, states, strict=True)]


def _create(name: str, owners: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
    """Zeros for a moment of many parameters, in one allocation a device: neighbours lie side by side."""
    for device in {parameter.device for parameter, _ in owners}:
        local = [(parameter, state) for parameter, state in owners if parameter.device == device]
        slots = layout_slots([("", parameter.shape) for parameter, _ in local], torch.float32)
        data = FlatArena.build(slots, torch.float32, device=device).data
        for slot, (parameter, state) in zip(slots, local, strict=True):
            state[name] = data.as_strided(parameter.shape, _strides_for(parameter), slot.offset)


def _moved(current: Tensor | None, home: Tensor) -> Tensor:
    if current is None:
        return home.zero_()
    if current.data_ptr() == home.data_ptr() and current.stride() == home.stride():
        return current
    return home.copy_(current)


def _fits(moment: Tensor, parameter: Tensor) -> bool:
    return (
        moment.stride() == _strides_for(parameter)
        and moment.dtype == torch.float32
        and moment.device == parameter.device
    )


def _strides_for(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's own strides where it fills its memory, else contiguous ones (see LooseSegments)."""
    return parameter.stride() if is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
