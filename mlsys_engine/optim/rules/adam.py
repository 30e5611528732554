"""Adam (Kingma & Ba 2015) with coupled weight decay: torch.optim.Adam's semantics, natively."""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from mlsys_engine.optim.base import Group
from mlsys_engine.optim.formats import Precision
from mlsys_engine.optim.rules.adam_family import AdamFamily, adam_hyper, check_adam_group


class Adam(AdamFamily):
    """Drop-in for torch.optim.Adam on float32 parameters: 28 bytes moved and 16 stored a parameter.

    Weight decay adds to the gradient; with `decoupled_weight_decay` it shrinks the parameter, as AdamW's.
    """

    rule: ClassVar[str] = "adam"

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
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            decoupled_weight_decay=decoupled_weight_decay,
            **precision,
        )

    def hyper_row(self, group: Group) -> tuple[float | Tensor, ...]:
        return *adam_hyper(group), 1.0 if group["decoupled_weight_decay"] else 0.0

    def check_group(self, group: Group) -> None:
        check_adam_group(group, "Switch it off, or use torch.optim.Adam.")
