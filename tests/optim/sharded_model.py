"""The FSDP2 model that tests of DTensor parameters train, its layers cut unevenly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

WIDTH, HIDDEN = 5, 7  # neither divides by the number of ranks; the last layer's one row leaves a rank empty


def model(mesh: Any = None) -> nn.Module:
    torch.manual_seed(11)
    net = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1))
    if mesh is not None:
        for layer in (net[0], net[2], net[3]):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def loss_of(net: nn.Module, step: int, rank: int, world_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(4 * world_size, WIDTH, generator=generator)
    return net(batch.chunk(world_size)[rank]).square().mean()
