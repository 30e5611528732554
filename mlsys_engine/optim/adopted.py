"""Arenas that an optimizer was given: which parameter is which slot, and the moments laid out alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_arena import FlatArena, Slot


class AdoptedArena:
    """One pair of parameter and gradient arenas, with an arena of the same slots for each moment."""

    def __init__(self, params: FlatArena, grads: FlatArena) -> None:
        if params.slots != grads.slots:
            raise ConfigError(
                "adopt() was given arenas of different layouts.",
                "Parameters and gradients must have the same slots.",
                "Build both from one layout_slots(...).",
            )
        if params.data.dtype != torch.float32 or grads.data.dtype != torch.float32:
            raise ConfigError(
                f"adopt() was given {params.data.dtype} parameters and {grads.data.dtype} gradients.",
                "float32 arenas are expected.",
                "Keep the model in float32.",
            )
        self.params, self.grads = params, grads
        self.order: dict[Tensor, int] = {}  # parameter -> index of its slot
        self._moments: dict[str, FlatArena] = {}

    def claim(self, candidates: Sequence[Tensor], names: Mapping[Tensor, str]) -> None:
        """Finds the parameter of each slot among `candidates`: by name, and without names by address."""
        by_name = {name: parameter for parameter, name in names.items()}
        by_address = {parameter.data_ptr(): parameter for parameter in candidates if parameter.numel()}
        for index, slot in enumerate(self.params.slots):
            view = self.params.view(slot)
            parameter = by_name.get(slot.name)
            if parameter is None:
                parameter = by_address.get(view.data_ptr()) if slot.numel else None
            if parameter is None:
                continue  # frozen, or another optimizer's
            if (
                parameter.data_ptr() != view.data_ptr()
                or parameter.shape != view.shape
                or parameter.stride() != view.stride()
            ):
                raise ConfigError(
                    f"Parameter {slot.name} does not live in its slot of the adopted arena.",
                    "Its data must be arena.view(slot).",
                    "Assign parameter.data = params.view(slot) before adopt().",
                )
            self.order[parameter] = index

    def slot(self, parameter: Tensor) -> Slot:
        return self.params.slots[self.order[parameter]]

    def moment(self, parameter: Tensor, name: str) -> Tensor:
        """The view for moment `name` of `parameter`; its arena is created, zero-filled, at the first call."""
        return self.moments(name).view(self.slot(parameter))

    def moments(self, name: str) -> FlatArena:
        if name not in self._moments:
            self._moments[name] = FlatArena.build(
                self.params.slots, torch.float32, device=self.params.data.device
            )
        return self._moments[name]
