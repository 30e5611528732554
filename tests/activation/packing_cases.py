"""Tensors that packing has to cope with, and what "the same" means for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mlsys_engine.activation.packing import FORMS

SIZES = (0, 1, 7, 8, 31, 63, 64, 65, 130, 1000, 70_001)
TAKEN = [(form, dtype) for form, known in FORMS.items() for dtype in sorted(known.dtypes, key=str)]
IN_BLOCKS = [(form, dtype) for form, dtype in TAKEN if form in {"int8", "fp8"}]


def spread(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers whose blocks differ by orders of magnitude; of bool, their signs."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator)
    if dtype == torch.bool:
        return normal > 0
    scale = torch.exp(torch.randn(numel, generator=generator) * 3)
    return (normal * scale).clamp(-60_000, 60_000).to(dtype)  # within float16


def hard_tensors(dtype: torch.dtype) -> Iterator[Tensor]:
    """Every size; zeros, inf and nan among ordinary numbers; denormals; the largest; unaligned views."""
    for numel in SIZES:
        yield spread(numel, dtype)
    yield spread(501, dtype)[3:]
    if dtype != torch.bool:
        ordinary, info = spread(1000, dtype), torch.finfo(dtype)
        special = ordinary.clone()
        special[::37], special[5::41], special[7::53] = torch.inf, -torch.inf, torch.nan
        special[400:600] = 0
        yield special
        yield special[1:]
        yield torch.full((65,), torch.nan, dtype=dtype)
        yield (ordinary.double() * info.smallest_normal / 64).to(dtype)
        yield (torch.rand(1000, generator=torch.Generator().manual_seed(1)) * 2 - 1).mul(info.max).to(dtype)
        yield torch.full((64,), -info.max, dtype=dtype)


def same_values(ours: Tensor, wanted: Tensor) -> bool:
    """Equal, and nan where the other is nan."""
    nan = wanted.isnan()
    return torch.equal(ours.isnan(), nan) and torch.equal(ours[~nan], wanted[~nan])
