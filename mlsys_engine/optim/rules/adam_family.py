"""What Adam and its kin share: two means of the gradient, their hyper-parameters and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack

from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.optimizer import ParamsT

from mlsys_engine.optim.base import Group, NativeOptimizer
from mlsys_engine.optim.checks import check_betas, check_flag_is_off, check_range
from mlsys_engine.optim.formats import Precision


class AdamFamily(NativeOptimizer):
    """Base of Adam and AdamW, which differ in where the weight decay goes."""

    counts_steps: ClassVar[bool] = True
    moment_kinds: ClassVar[Mapping[str, str]] = {
        "exp_avg": "signed",
        "exp_avg_sq": "unsigned",
        "max_exp_avg_sq": "unsigned",
    }

    def __init__(  # noqa: PLR0917 (torch's own signature)
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        amsgrad: bool,
        *,
        maximize: bool,
        decoupled_weight_decay: bool,
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
                "amsgrad": amsgrad,
                # torch's switches: kept, switched off, so that state dictionaries have the same keys.
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            precision,
        )

    def moment_names(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def torch_step(self, group: Group, params: list[Tensor], grads: list[Tensor], fresh: list[bool]) -> None:
        states = [self.state[parameter] for parameter in params]
        beta1, beta2 = group["betas"]
        torch_adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )


def adam_hyper(group: Group) -> tuple[float | Tensor, ...]:
    """The columns that the hyper-parameter rows of the family begin with."""
    beta1, beta2 = group["betas"]
    sign = -1.0 if group["maximize"] else 1.0
    return group["lr"], beta1, beta2, group["eps"], group["weight_decay"], sign


def check_adam_group(group: Group, action: str) -> None:
    """Raises ConfigError for what no rule of the family can work with; `action` is for `differentiable`."""
    check_range("lr", group["lr"])
    check_betas(group["betas"])
    check_range("eps", group["eps"])
    check_range("weight_decay", group["weight_decay"])
    check_flag_is_off(group, "differentiable", action)
