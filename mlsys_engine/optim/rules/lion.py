"""Lion (Chen et al. 2023): steps of one size in the direction of a sign, with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.optim.base import Group, NativeOptimizer
from mlsys_engine.optim.checks import check_betas, check_flag_is_off, check_range
from mlsys_engine.optim.formats import Precision


class Lion(NativeOptimizer):
    """Lion on float32 parameters: 20 bytes moved and 12 stored a parameter; torch has none.

    Against AdamW, the paper takes a learning rate 3 to 10 times smaller and a decay as much larger.
    """

    rule: ClassVar[str] = "lion"
    counts_steps: ClassVar[bool] = False
    moment_kinds: ClassVar[Mapping[str, str]] = {"exp_avg": "signed"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **precision: Unpack[Precision],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "differentiable": False,
            },
            precision,
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg",)

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        sign = -1.0 if group["maximize"] else 1.0
        return group["lr"], beta1, beta2, group["weight_decay"], sign

    def check_group(self, group: Group) -> None:
        check_range("lr", group["lr"])
        check_betas(group["betas"])
        check_range("weight_decay", group["weight_decay"])
        check_flag_is_off(group, "differentiable", "Switch it off.")

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        beta1, beta2 = group["betas"]
        rate = group["lr"]
        moments = [self.state[parameter]["exp_avg"] for parameter in params]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        mixed = torch._foreach_mul(moments, beta1)
        torch._foreach_add_(mixed, grads, alpha=1 - beta1)
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        # torch.sign makes zero of nan; the rule keeps it.
        signs = [torch.where(value.isnan(), value, value.sign()) for value in mixed]
        torch._foreach_mul_(signs, rate)
        torch._foreach_sub_(params, signs)
        torch._foreach_mul_(moments, beta2)
        torch._foreach_add_(moments, grads, alpha=1 - beta2)
