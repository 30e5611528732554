"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019), with torch.optim.AdamW's semantics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.optim.checks import check_flag_is_off, check_range
from mlsys_engine.optim.formats import Precision


class AdamW(NativeOptimizer):
    """Drop-in for torch.optim.AdamW: on float32 parameters 28 bytes moved and 16 stored a parameter.

    `precision` are the keywords of `mls.optim.Precision`: master, moments, ema, seed.
    """

    rule: ClassVar[str] = "adamw"
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
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **precision: Unpack[Precision],
    ) -> None:
        # The last five are torch's: kept, switched off, so that state dictionaries have the same keys.
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
                "decoupled_weight_decay": True,
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
        )

    def check_group(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"])
        for index, beta in enumerate(group["betas"]):
            check_range(f"betas[{index}]", beta, below=1.0)
        check_range("eps", group["eps"])
        check_range("weight_decay", group["weight_decay"])
        check_flag_is_off(group, "differentiable", "Switch it off, or use torch.optim.AdamW.")
        if not group["decoupled_weight_decay"] and group["weight_decay"]:
            raise ConfigError(
                "decoupled_weight_decay=False is set.",
                "AdamW decays weights decoupled.",
                "Use torch.optim.Adam, or set it to True.",
            )

    def torch_step(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], fresh: list[bool]
    ) -> None:
        states = [self.state[parameter] for parameter in params]
        beta1, beta2 = group["betas"]
        torch_adamw(
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
        )
