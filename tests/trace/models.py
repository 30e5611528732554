"""Models whose blocks pass more to each other than one tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Hidden:
    """A dataclass that torch's pytrees do not know."""

    x: Tensor
    scale: Tensor


class Step(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, hidden: Hidden, mask: Tensor) -> Hidden:
        x = hidden.x + self.dropout(self.layer(hidden.x)) * hidden.scale
        return Hidden(x=x.masked_fill(mask, 0.0), scale=hidden.scale)


class Skipping(nn.Module):
    """A U-Net's habit: what the first half made is read again by the second half. A mask goes to all."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.down = nn.ModuleList(Step(width) for _ in range(2))
        self.up = nn.ModuleList(Step(width) for _ in range(2))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, keep: Tensor, labels: Tensor) -> dict[str, Tensor]:
        mask = ~keep[:, None]
        hidden = Hidden(x=self.embed(x), scale=torch.full((), 0.5))
        kept = []
        for step in self.down:
            hidden = step(hidden, mask)
            kept.append(hidden.x)
        for step in self.up:
            hidden = step(Hidden(x=hidden.x + kept.pop(), scale=hidden.scale), mask)
        logits = self.head(hidden.x)
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def skipping_sample() -> dict[str, Tensor]:
    return {
        "x": torch.randn(3, 4),
        "keep": torch.tensor([True, True, False]),
        "labels": torch.randn(3, 2),
    }
