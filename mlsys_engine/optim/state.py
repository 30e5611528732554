"""The optimizer's state tensors: created at a parameter's first step, laid out as its kernel needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlsys_engine.errors import CheckpointError
from mlsys_engine.memory.flat_arena import FlatArena, layout_slots
from mlsys_engine.optim import distributed
from mlsys_engine.optim.formats import (
    DTYPE_OF,
    EMA_KEY,
    LIKE_PARAMETER,
    MASTER_KEY,
    SCALE_SUFFIX,
    Form,
    Master,
    Stored,
    random_key,
)
from mlsys_engine.optim.kernels import is_native
from mlsys_engine.optim.segments import Row, is_dense
from mlsys_engine.optim.storage import decoded, encoded, joined, num_scales, remainder_of, to_bfloat16_away

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
    names = optimizer._names()
    forms = [optimizer.form_of(params[i], optimizer.param_groups[group_of[i]]) for i in positions]
    counted = [optimizer.counts_steps or form.is_random for form in forms]
    # As torch: a rule without state leaves no empty entries behind.
    states = [
        optimizer.state[params[i]] if needs[group_of[i]] or is_counted or not form.is_plain else {}
        for i, form, is_counted in zip(positions, forms, counted, strict=True)
    ]
    before = {device: counts.on(device).tolist() for device in {params[i].device for i in positions}}
    steps = []
    for position, state, is_counted in zip(positions, states, counted, strict=True):
        view = counts.view(params[position].device, position)
        current = before[params[position].device][position]
        made = _made_steps if optimizer.counts_steps else _made_random_steps
        moments = needs[group_of[position]]
        steps.append((made if is_counted else _has_stepped)(state, view, moments, current))
        if steps[-1] != current:
            view.fill_(steps[-1])
        if is_counted:
            state["step"] = view
    # A DTensor is stepped by this rank's shard; what is laid out like it becomes DTensors around such shards.
    needed = [needs[group_of[i]] for i in positions]
    owners = [params[i] for i in positions]
    homes = [distributed.local(parameter) for parameter in owners]
    shards = [
        distributed.local_state(parameter, state, (*names, *LIKE_PARAMETER), optimizer.name_of)
        for parameter, state, names in zip(owners, states, needed, strict=True)
    ]
    _lay_out_moments(optimizer, homes, needed, forms, shards)
    for home, form, own in zip(homes, forms, shards, strict=True):
        _lay_out_master(home, form, own)
        _lay_out_ema(home, form, own)
    for parameter, state, moments, own in zip(owners, states, needed, shards, strict=True):
        distributed.store_state(parameter, state, (*moments, *LIKE_PARAMETER), own)
    return [
        Row(
            # torch's own step knows DTensors.
            parameter=home if optimizer.elementwise and is_native(home.device) else params[i],
            moments=tuple(own[name] for name in needs[group_of[i]]),
            group=group_of[i],
            step_index=i,
            step=step,
            form=form,
            scales=tuple(own.get(name + SCALE_SUFFIX) for name in needs[group_of[i]]),
            master=own.get(MASTER_KEY[form.master]) if form.master else None,
            ema=own.get(EMA_KEY),
            key=_key(names.get(params[i], str(i)), optimizer.param_groups[group_of[i]], form),
            first_element=distributed.first_element(params[i]),
        )
        for i, home, own, step, form in zip(positions, homes, shards, steps, forms, strict=True)
    ]


def _key(name: str, group: dict[str, Any], form: Form) -> int:
    return random_key(name, group["seed"]) if form.is_random else 0


def _has_stepped(state: dict[str, Any], view: Tensor, names: Sequence[str], current: float) -> float:
    """For rules without a count only "was there a step before" matters, and the moments tell.

    As in torch, none or None means no.
    """
    return max(current, 1.0) if any(state.get(name) is not None for name in names) else 0.0


def _made_random_steps(state: dict[str, Any], view: Tensor, names: Sequence[str], current: float) -> float:
    """As _made_steps, of a rule that counts for its random numbers alone: elsewhere it saves no count."""
    if state.get("step") is None:
        return _has_stepped(state, view, names, current)
    return _made_steps(state, view, names, current)


def _made_steps(state: dict[str, Any], view: Tensor, names: Sequence[str], current: float) -> float:
    """How many steps this parameter has made: by its own state, which may be new, loaded, or edited."""
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


def _lay_out_moments(
    optimizer: NativeOptimizer,
    params: Sequence[Tensor],
    needs: Sequence[Sequence[str]],
    forms: Sequence[Form],
    states: Sequence[dict[str, Any]],
) -> None:
    """Each parameter's moments in their forms: in adopted arenas if there are some, else laid out like it."""
    arena_of = {parameter: arena for arena in optimizer._adopted for parameter in arena.order}
    new: dict[tuple[str, Stored], list[tuple[Tensor, dict[str, Any]]]] = {}
    for parameter, names, form, state in zip(params, needs, forms, states, strict=True):
        arena = arena_of.get(parameter) if form.is_plain else None
        for name, stored in zip(names, form.states, strict=True):
            current = state.get(name)
            if current is not None and current.shape != parameter.shape:
                raise CheckpointError(
                    f"The optimizer state {name} has shape {tuple(current.shape)}.",
                    f"{tuple(parameter.shape)} is expected, like its parameter.",
                    "Load the state that was saved with this model.",
                )
            if arena is not None:
                state[name] = _moved(current, arena.moment(parameter, name))
            elif current is None:
                new.setdefault((name, stored), []).append((parameter, state))
            elif not _fits(current, parameter, stored, state.get(name + SCALE_SUFFIX)):
                is_unsigned = optimizer.moment_kinds.get(name) == "unsigned"
                value = _as_float(state, name, Stored.UNSIGNED8 if is_unsigned else Stored.SIGNED8)
                _store_moment(state, name, stored, _laid_out_like(parameter, value))
    for (name, stored), owners in new.items():
        _create(name, stored, owners)


def _create(name: str, stored: Stored, owners: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
    """Zeros for a moment of many parameters, in one allocation a device: neighbours lie side by side."""
    for device in {parameter.device for parameter, _ in owners}:
        local = [(parameter, state) for parameter, state in owners if parameter.device == device]
        slots = layout_slots([("", parameter.shape) for parameter, _ in local], DTYPE_OF[stored])
        data = FlatArena.build(slots, DTYPE_OF[stored], device=device).data
        for slot, (parameter, state) in zip(slots, local, strict=True):
            state[name] = data.as_strided(parameter.shape, _strides_for(parameter), slot.offset)
            if DTYPE_OF[stored] is torch.uint8:
                state[name + SCALE_SUFFIX] = torch.zeros(
                    num_scales(parameter.numel()), dtype=torch.uint8, device=device
                )


def _moved(current: Tensor | None, home: Tensor) -> Tensor:
    if current is None:
        return home.zero_()
    if current.data_ptr() == home.data_ptr() and current.stride() == home.stride():
        return current
    return home.copy_(current)


def _fits(moment: Tensor, parameter: Tensor, stored: Stored, scales: Tensor | None) -> bool:
    return (
        moment.stride() == _strides_for(parameter)
        and moment.dtype == DTYPE_OF[stored]
        and moment.device == parameter.device
        and (scales is not None) == (moment.dtype is torch.uint8)
    )


def _as_float(state: dict[str, Any], name: str, codes: Stored) -> Tensor:
    """The moment in float32, whatever it was stored in; its scales are taken out of the state."""
    current: Tensor = state[name]
    scales = state.pop(name + SCALE_SUFFIX, None)
    return current.float() if scales is None else decoded(current, scales, codes)


def _store_moment(state: dict[str, Any], name: str, stored: Stored, value: Tensor) -> None:
    if DTYPE_OF[stored] is torch.uint8:
        state[name], state[name + SCALE_SUFFIX] = encoded(value, stored)
    else:
        state[name] = value.to(DTYPE_OF[stored])


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A float32 copy of `value` in the parameter's own layout, on its device."""
    home = torch.empty_strided(
        parameter.shape, _strides_for(parameter), dtype=torch.float32, device=parameter.device
    )
    return home.copy_(value)


def _lay_out_master(parameter: Tensor, form: Form, state: dict[str, Any]) -> None:
    """The bits that a narrow parameter has no room for, from whatever the state has of them."""
    if form.master is Master.NONE:
        for key in MASTER_KEY.values():
            state.pop(key, None)
        return
    own, other = ("remainder", "master") if form.master is Master.SPLIT else ("master", "remainder")
    if state.get(own) is not None and _is_master(state[own], parameter, form.master):
        state.pop(other, None)
        return
    whole = _laid_out_like(parameter, parameter.detach())
    if (saved := state.get("master")) is not None:
        # A parameter that is not its copy's rounding was written by somebody else, who is right.
        saved = _laid_out_like(parameter, saved)
        rounded = to_bfloat16_away(saved) if parameter.dtype is torch.bfloat16 else saved.to(parameter.dtype)
        whole = torch.where(rounded == parameter, saved, whole)
    elif (remainder := state.get("remainder")) is not None:
        whole = _laid_out_like(parameter, joined(parameter, remainder.to(parameter.device)))
    whole = _laid_out_like(parameter, whole)
    state.pop(other, None)
    state[own] = remainder_of(whole) if form.master is Master.SPLIT else whole


def _is_master(held: Tensor, parameter: Tensor, master: Master) -> bool:
    dtype = torch.int16 if master is Master.SPLIT else torch.float32
    return (
        held.dtype is dtype and held.stride() == _strides_for(parameter) and held.device == parameter.device
    )


def _lay_out_ema(parameter: Tensor, form: Form, state: dict[str, Any]) -> None:
    """The moving average of the weights; it begins at what they are."""
    if not form.has_ema:
        state.pop(EMA_KEY, None)
        return
    held = state.get(EMA_KEY)
    if held is None:
        state[EMA_KEY] = _laid_out_like(parameter, parameter.detach())
    elif (
        held.dtype is not torch.float32
        or held.stride() != _strides_for(parameter)
        or held.device != parameter.device
    ):
        state[EMA_KEY] = _laid_out_like(parameter, held)


def _strides_for(parameter: Tensor) -> tuple[int, ...]:
    """The parameter's own strides where it fills its memory, else contiguous ones (see LooseSegments)."""
    return parameter.stride() if is_dense(parameter) else torch.empty(parameter.shape, device="meta").stride()
