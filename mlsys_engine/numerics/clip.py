"""What the summed gradient is multiplied by before the optimizer sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class GradientScale:
    """0-d tensors on the device, float64 except `skip` (bool)."""

    norm: torch.Tensor  # 2-norm of the mean gradient, before clipping
    scale: torch.Tensor  # the mean and the clip coefficient in one factor
    skip: torch.Tensor  # the gradient is not finite, or nothing was counted


def gradient_scale(
    sum_of_squares: torch.Tensor, count: torch.Tensor, max_norm: float | None
) -> GradientScale:
    """From the summed gradient's sum of squares and the global count, in float64.

    The clip coefficient is min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_ has it. Equal inputs
    give equal results, so ranks that hold the same reduced gradient agree without talking.
    """
    norm = sum_of_squares.to(torch.float64).sqrt() / count
    scale = torch.ones_like(norm) / count
    if max_norm is not None:
        scale = scale * torch.clamp(max_norm / (norm + CLIP_EPSILON), max=1.0)
    return GradientScale(norm=norm, scale=scale, skip=~torch.isfinite(norm))
