"""The native operators of the optimizers, loaded at the first use, with shapes for tracing ("fakes")."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from mlsys_engine.native import build_info, load_kernels

SEGMENT_COLUMNS = 17  # csrc/optim/segment.h
CHUNK_ELEMENTS = 4096
HYPER_COLUMNS = 12
EMA_DECAY_COLUMN = 11


@functools.cache
def operators() -> Any:
    """`torch.ops.mlsys`, loaded. Raises NativeBuildError with what to type when it is not built."""
    load_kernels()
    torch.library.register_fake("mlsys::cast", _fake_cast)
    for name in ("sum_of_squares", "chunk_squares", "add_terms"):
        torch.library.register_fake(f"mlsys::{name}", _fake_into_out)
    return torch.ops.mlsys


def step_operator(rule: str) -> Any:
    """The operator that steps a segment table by `rule`."""
    return getattr(operators(), f"{rule}_step")


def is_native(device: torch.device) -> bool:
    """Whether our kernels run on this device; if not, torch's own implementation does."""
    return device.type == "cpu" or (device.type == "cuda" and build_info().cuda_kernels)


def _fake_cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(input, dtype=dtype)


def _fake_into_out(source: Tensor, out: Tensor, form: int = 0) -> None:
    return None
