"""Small models with the habits that make recomputation hard."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Dropout, a keyword argument and a dictionary output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        return {"x": x + scale * self.dropout(self.down(F.gelu(self.up(self.norm(x)))))}


class Stack(nn.Module):
    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)["x"]
        return x


class Group(nn.Module):
    """A block made of blocks, for nested regions; it calls its first block twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[0](x)["x"]
        x = self.inner[1](x)["x"]
        return self.inner[0](x)["x"]


class Nested(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Group(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for group in self.groups:
            x = group(x)
        return x


class Normed(nn.Module):
    """Blocks that write buffers: BatchNorm statistics and spectral norm's vectors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Linear(width, width)),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Unruly(nn.Module):
    """A block that saves other tensors each time it runs."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])
        self.blocks[0].forward = self._run
        self.change, self.calls = change, 0

    def _run(self, x: Tensor) -> Tensor:
        self.calls += 1
        layer = self.blocks[0][0]
        if self.calls % 2 == 1:
            return layer(x).exp().exp().exp()
        if self.change == "fewer":
            return layer(x)
        return layer(torch.cat([x, x])).exp().exp().exp()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)
