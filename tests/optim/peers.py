"""Optimizers to compare ours with: torch's own, and where torch has none the float64 reference in its
manner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlsys_engine.optim import OPTIMIZERS, optimizer_class
from mlsys_engine.optim.reference import REFERENCES

TORCH_PEERS: dict[str, Any] = {
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class ReferencePeer(torch.optim.Optimizer):
    """Steps in float64 by a rule's reference; between steps it keeps what our optimizer keeps, in float32."""

    def __init__(self, name: str, params: Any, variant: dict[str, Any]) -> None:
        self._reference, self._ours = REFERENCES[name], optimizer_class(name)
        template: Any = self._ours(params, **variant)  # type: ignore[call-arg]
        self._template = template
        super().__init__([dict(group) for group in template.param_groups], dict(template.defaults))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shared = {key: group[key] for key in ("k", "lr_max", "weight_sum") if key in group}
            after = shared
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._unpacked(parameter, group) | shared
                value = self._reference(parameter.double(), parameter.grad.double(), state, group)
                parameter.copy_(value)
                self._pack(parameter, group, state)
                after = {key: state[key] for key in shared}
            group.update(after)

    def _unpacked(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {
            key: value.item() if key == "step" else value.double()
            for key, value in self.state[parameter].items()
        }
        if "z" in state:  # schedule-free: the average that y and z imply
            beta1 = group["betas"][0]
            state["x"] = (parameter.double() - (1 - beta1) * state["z"]) / beta1
        return state

    def _pack(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        own = self.state[parameter]
        for name in ("step", *self._template.moment_names(group)):
            if name in state and (name != "step" or self._counts(group)):
                value = state[name]
                own[name] = value.float() if isinstance(value, Tensor) else torch.tensor(float(value))

    def _counts(self, group: dict[str, Any]) -> bool:
        """Whether parameters of the group have a step count in their state; those of Muon's AdamW have."""
        return self._ours.counts_steps or not group.get("use_muon", True)


def make_peer(name: str, params: Any, variant: dict[str, Any], **options: Any) -> torch.optim.Optimizer:
    """The peer of a registered optimizer; `options` are torch's own, such as fused."""
    assert name in OPTIMIZERS
    if name in TORCH_PEERS:
        peer: torch.optim.Optimizer = TORCH_PEERS[name](params, **variant, **options)
        return peer
    return ReferencePeer(name, params, variant)
