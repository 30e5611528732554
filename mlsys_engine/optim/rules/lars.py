"""LARS (You, Gitman & Ginsburg 2017): momentum for very large batches, a learning rate for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.base import Group
from mlsys_engine.optim.checks import check_flag_is_off, check_range
from mlsys_engine.optim.formats import Precision
from mlsys_engine.optim.rules.tensor_rule import TensorRule, norms


class LARS(TensorRule):
    """LARS: on float32 parameters 28 bytes moved and 12 stored a parameter, in two sweeps; torch has none.

    A tensor's rate is lr * trust * |p| / (|g| + decay * |p|). As in the paper the momentum holds steps, rates
    included. Biases and the weights of norms are neither decayed nor scaled: see `exclude` of TensorRule.
    """

    rule: ClassVar[str] = "lars"
    counts_steps: ClassVar[bool] = False
    moment_kinds: ClassVar[Mapping[str, str]] = {"momentum_buffer": "signed"}

    def __init__(  # noqa: PLR0917 (in the order of torch.optim.SGD)
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust: float = 1e-3,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **precision: Unpack[Precision],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust": trust,
                "nesterov": nesterov,
                "maximize": maximize,
                "differentiable": False,
                "exclude": False,
            },
            precision,
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        return (
            group["lr"],
            group["momentum"],
            0.0 if group["exclude"] else group["weight_decay"],
            group["trust"],
            1.0 if group["nesterov"] else 0.0,
            -1.0 if group["maximize"] else 1.0,
            0.0 if group["exclude"] else 1.0,
        )

    def check_group(self, group: Group) -> None:
        for name in ("lr", "momentum", "weight_decay", "trust"):
            check_range(name, group[name])
        check_flag_is_off(group, "differentiable", "Switch it off.")
        if group["nesterov"] and group["momentum"] <= 0:
            raise ConfigError(
                f"nesterov=True was given with momentum={group['momentum']}.",
                "Nesterov looks ahead along a momentum.",
                "Set momentum=0.9, or nesterov=False.",
            )

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        lr, momentum, decay, trust, nesterov, sign, adapt = self.hyper_row(group)
        grads = list(torch._foreach_mul(grads, sign))
        for parameter, gradient, size, slope in zip(params, grads, norms(params), norms(grads), strict=True):
            rate = trust * size / (slope + decay * size)
            plain = (size == 0) | (slope == 0) if adapt else torch.ones_like(size, dtype=torch.bool)
            decayed = gradient + decay * parameter if decay else gradient
            step = lr * torch.where(plain, torch.ones_like(rate), rate) * decayed
            buffer = self.state[parameter]["momentum_buffer"]
            buffer.mul_(momentum).add_(step)
            parameter.sub_(step + momentum * buffer if nesterov else buffer)
