"""LAMB (You et al. 2020): AdamW for very large batches, each tensor's step scaled to its own norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.optim.base import Group
from mlsys_engine.optim.formats import Precision
from mlsys_engine.optim.rules.adam_family import adam_hyper, check_adam_group
from mlsys_engine.optim.rules.tensor_rule import TensorRule, norms, ratio_or_one


class LAMB(TensorRule):
    """LAMB: on float32 parameters 40 bytes moved and 16 stored a parameter, in two sweeps; torch has none.

    The step lr * |p| / |u| * u with u = m / (sqrt(v) + eps) + decay * p, moments corrected for their start.
    Biases and the weights of norms are neither decayed nor scaled: see `exclude` of TensorRule.
    """

    rule: ClassVar[str] = "lamb"
    counts_steps: ClassVar[bool] = True
    moment_kinds: ClassVar[Mapping[str, str]] = {"exp_avg": "signed", "exp_avg_sq": "unsigned"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **precision: Unpack[Precision],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "differentiable": False,
                "exclude": False,
            },
            precision,
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        if group["exclude"]:
            return *adam_hyper({**group, "weight_decay": 0.0}), 0.0
        return *adam_hyper(group), 1.0

    def check_group(self, group: Group) -> None:
        check_adam_group(group, "Switch it off.")

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        lr, (beta1, beta2), adapt = group["lr"], group["betas"], not group["exclude"]
        decay = group["weight_decay"] if adapt else 0.0
        states = [self.state[parameter] for parameter in params]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        grads = list(torch._foreach_neg(grads)) if group["maximize"] else grads
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        updates = []
        for parameter, state in zip(params, states, strict=True):
            bias1, bias2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
            root = (state["exp_avg_sq"] / bias2).sqrt_().add_(group["eps"])
            updates.append(state["exp_avg"] / bias1 / root + decay * parameter)
        sizes = zip(norms(params), norms(updates), strict=True)
        scales = [lr * ratio_or_one(top, bottom) if adapt else lr for top, bottom in sizes]
        for parameter, update, scale in zip(params, updates, scales, strict=True):
            parameter.sub_(scale * update)
