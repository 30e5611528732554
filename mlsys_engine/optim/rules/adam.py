"""Adam (Kingma & Ba 2015) with coupled weight decay: torch.optim.Adam's semantics, natively."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.adam import adam as torch_adam
from torch.optim.optimizer import ParamsT

from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.checks import check_flag_is_off, check_range
from mlsys_engine.optim.formats import Precision


class Adam(NativeOptimizer):
    """Drop-in for torch.optim.Adam on float32 parameters: 28 bytes moved and 16 stored a parameter.

    Weight decay adds to the gradient; with `decoupled_weight_decay` it shrinks the parameter, as AdamW's.
    """

    rule: ClassVar[str] = "adam"
    counts_steps: ClassVar[bool] = True
    moment_kinds: ClassVar[Mapping[str, str]] = {
        "exp_avg": "signed",
        "exp_avg_sq": "unsigned",
        "max_exp_avg_sq": "unsigned",
    }

    def __init__(  # noqa: PLR0917 (torch's own signature)
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **precision: Unpack[Precision],
    ) -> None:
        # The last ones are torch's: kept, switched off, so that state dictionaries have the same keys.
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "amsgrad": amsgrad,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            precision,
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def hyper_row(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return (
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            -1.0 if group["maximize"] else 1.0,
            1.0 if group["decoupled_weight_decay"] else 0.0,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"])
        for index, beta in enumerate(group["betas"]):
            check_range(f"betas[{index}]", beta, below=1.0)
        check_range("eps", group["eps"])
        check_range("weight_decay", group["weight_decay"])
        check_flag_is_off(group, "differentiable", "Switch it off, or use torch.optim.Adam.")

    def torch_step(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], fresh: list[bool]
    ) -> None:
        states = [self.state[parameter] for parameter in params]
        beta1, beta2 = group["betas"]
        torch_adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            decoupled_weight_decay=group["decoupled_weight_decay"],
        )
