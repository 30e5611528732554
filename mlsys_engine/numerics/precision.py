"""What a plan's precision means: the types of parameters and products, and whether losses are scaled."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True, kw_only=True)
class PrecisionRule:
    """One precision of a plan."""

    products: torch.dtype | None = None
    """Type of matrix products, by autocast; None: whatever the parameters have."""
    parameters: torch.dtype | None = None
    """Type that parameters are cast to, with gradients summed in float32; None: both keep their own."""
    scales_loss: bool = False
    """Whether gradients would vanish without a loss scale."""


# Under autocast parameters stay float32 and are cast for each product. "Pure" ones are cast once and run
# under autocast all the same: that keeps losses in float32, and takes buffers and inputs of other types.
PRECISION_RULES: Mapping[str, PrecisionRule] = MappingProxyType(
    {
        "fp32": PrecisionRule(),
        "bf16": PrecisionRule(products=torch.bfloat16),
        "fp16": PrecisionRule(products=torch.float16, scales_loss=True),
        "bf16-pure": PrecisionRule(products=torch.bfloat16, parameters=torch.bfloat16),
        "fp16-pure": PrecisionRule(products=torch.float16, parameters=torch.float16, scales_loss=True),
    }
)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where forward and loss run: under torch.autocast, or under nothing for "fp32".

    Backward runs outside, in the types that forward has chosen.
    """
    products = PRECISION_RULES[precision].products
    return contextlib.nullcontext() if products is None else torch.autocast(device.type, dtype=products)
