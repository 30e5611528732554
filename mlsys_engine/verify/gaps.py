"""How far one tensor is from another, as a few numbers that can be sent to another rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# A value far below the others is what is left when larger terms cancel (the gradient of an attention's key
# bias is 0 but for rounding), so it is held against this part of the largest of its kind, if that is more.
SMALL = 1e-3
# A value is "a multiple" of another up to this part of itself.
_MULTIPLE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The difference of a tensor of the plan's run from the unsharded run's."""

    relative: float
    absolute: float
    factor: float | None = None
    """The number that turns the unsharded value into this one; None where there is none."""
    mark: float = 0.0
    """A projection over the scale: ranks with equal values have equal marks."""

    @classmethod
    def of(cls, absolute: float, scale: float, factor: float | None = None, mark: float = 0.0) -> Gap:
        if not math.isfinite(absolute):
            return cls(relative=math.inf, absolute=math.inf)
        relative = 0.0 if absolute == 0.0 else absolute / scale if scale > 0.0 else math.inf
        return cls(relative=relative, absolute=absolute, factor=factor, mark=mark)


def peak(value: torch.Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    return float(value.detach().abs().max()) if value.numel() else 0.0


def floor(values: Mapping[str, torch.Tensor]) -> float:
    """The scale below which a tensor of this kind is not held against itself."""
    return SMALL * max((peak(value) for value in values.values()), default=0.0)


@torch.no_grad()
def tensor_gap(
    own: torch.Tensor, true: torch.Tensor, scale: float, allowance: torch.Tensor | None = None
) -> Gap:
    """The gap between two tensors of one shape, less `allowance` of each element's difference."""
    own = own.detach().to(true.device, torch.float64).flatten()
    true = true.detach().to(torch.float64).flatten()
    apart = (own - true).abs()
    if allowance is not None:
        apart = (apart - allowance.flatten()).clamp(min=0.0).nan_to_num(nan=math.inf)
    absolute = peak(apart)
    if not math.isfinite(absolute) or absolute == 0.0:
        return Gap.of(absolute, scale, mark=_mark(own, scale))
    return Gap.of(absolute, scale, _factor(own, true), _mark(own, scale))


def _factor(own: torch.Tensor, true: torch.Tensor) -> float | None:
    squares = float(true @ true)
    if squares == 0.0:
        return None
    factor = float(own @ true) / squares
    left = float(torch.linalg.vector_norm(own - factor * true))
    return factor if left <= _MULTIPLE * math.sqrt(squares) else None


def _mark(own: torch.Tensor, scale: float) -> float:
    return float(own @ waves(own.numel(), own.device)) / scale if scale > 0.0 else 0.0


def waves(numel: int, device: torch.device) -> torch.Tensor:
    """Fixed weights: a projection on them tells permuted values apart, which a norm does not."""
    return torch.cos(torch.arange(numel, dtype=torch.float64, device=device))
