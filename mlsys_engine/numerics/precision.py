"""What a plan's precision means to forward and backward."""

from __future__ import annotations

import contextlib

import torch

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where forward and loss run: under torch.autocast for "bf16" and "fp16", as they are for "fp32".

    Parameters stay float32; torch casts them for matrix products, and keeps reductions, norms and losses in
    float32. Backward runs outside, in the types that forward has chosen.
    """
    if precision not in AUTOCAST_DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])
