"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019), with torch.optim.AdamW's semantics."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.checks import check_flag_is_off, check_range


class AdamW(NativeOptimizer):
    """Drop-in for torch.optim.AdamW on float32 parameters: 28 bytes moved and 16 stored a parameter.

    `master` and `moments` choose the precision of the master copy and of the moments; None and "fp32" are
    there.
    """

    rule: ClassVar[str] = "adamw"
    counts_steps: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        master: str | None = None,
        moments: str = "fp32",
    ) -> None:
        # The last six are torch's: kept, switched off, so that state dictionaries have the same keys.
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "master": master,
                "moments": moments,
                "amsgrad": False,
                "foreach": None,
                "capturable": False,
                "differentiable": False,
                "fused": None,
                "decoupled_weight_decay": True,
            },
        )

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def hyper_row(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        beta1, beta2 = group["betas"]
        return (
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            -1.0 if group["maximize"] else 1.0,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"])
        for index, beta in enumerate(group["betas"]):
            check_range(f"betas[{index}]", beta, below=1.0)
        check_range("eps", group["eps"])
        check_range("weight_decay", group["weight_decay"])
        check_flag_is_off(group, "amsgrad", "Switch it off, or use torch.optim.AdamW.")
        check_flag_is_off(group, "differentiable", "Switch it off, or use torch.optim.AdamW.")
        if not group["decoupled_weight_decay"] and group["weight_decay"]:
            raise ConfigError(
                "decoupled_weight_decay=False is set.",
                "AdamW decays weights decoupled.",
                "Use torch.optim.Adam, or set it to True.",
            )
        if group["master"] is not None or group["moments"] != "fp32":
            raise ConfigError(
                f"master={group['master']!r}, moments={group['moments']!r} was given.",
                'master=None and moments="fp32" are what this version has.',
                "Leave both out.",
            )

    def torch_step(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], fresh: list[bool]
    ) -> None:
        states = [self.state[parameter] for parameter in params]
        beta1, beta2 = group["betas"]
        torch.optim.adamw.adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
