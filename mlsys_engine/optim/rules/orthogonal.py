"""Batched Newton-Schulz orthogonalisation: the products inside a Muon step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Jordan et al. 2024: the quintic a x + b x^3 + c x^5 whose slope at zero is largest while five rounds of it
# bring every singular value in (0, 1] into about [0.7, 1.2].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    matrices: Tensor, coefficients: Sequence[float], eps: float, steps: int, dtype: torch.dtype
) -> Tensor:
    """About U V^T of each matrix U S V^T of [N, rows, cols], computed and returned in `dtype`.

    Each is divided by its Frobenius norm, or by `eps` where that is smaller, so that its singular values
    begin in [0, 1]; then come `steps` rounds of the quintic, with three products each on the shorter side. A
    matrix of zeros stays zero; inf or nan anywhere make nan of their matrix and of no other.
    """
    a, b, c = coefficients
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def shape_ratio(rows: int, cols: int, adjust_lr_fn: str | None) -> float:
    """What the learning rate is multiplied by for a matrix of this shape.

    "original" (None) keeps the update's norm per output alike (Jordan et al. 2024); "match_rms_adamw" gives
    its entries the root mean square of AdamW's updates (Liu et al. 2025, "Muon is scalable for LLM
    training").
    """
    if adjust_lr_fn == "match_rms_adamw":
        return float(0.2 * max(rows, cols) ** 0.5)
    return float(max(1.0, rows / cols) ** 0.5)
