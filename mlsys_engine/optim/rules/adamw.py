"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter 2019), with torch.optim.AdamW's semantics."""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.base import Group
from mlsys_engine.optim.formats import Precision
from mlsys_engine.optim.rules.adam_family import AdamFamily, adam_hyper, check_adam_group


class AdamW(AdamFamily):
    """Drop-in for torch.optim.AdamW: on float32 parameters 28 bytes moved and 16 stored a parameter.

    `precision` are the keywords of `mls.optim.Precision`: master, moments, ema, seed.
    """

    rule: ClassVar[str] = "adamw"

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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=True,
            **precision,
        )

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        return adam_hyper(group)

    def check_group(self, group: Group) -> None:
        check_adam_group(group, "Switch it off, or use torch.optim.AdamW.")
        if not group["decoupled_weight_decay"] and group["weight_decay"]:
            raise ConfigError(
                "decoupled_weight_decay=False is set.",
                "AdamW decays weights decoupled.",
                "Use mls.optim.Adam, or set it to True.",
            )
