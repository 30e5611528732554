"""Small models and batches that the tests of data parallelism share."""

from __future__ import annotations

import functools

import torch
from torch import nn

from mlsys_engine.data_parallel.build import build_runner
from mlsys_engine.plan import Plan
from mlsys_engine.strategies import DataParallel, PlanOptions
from mlsys_engine.strategies.base import Subject

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def squared_error(output, batch):
    """(sum, count) of squared errors of a batch (inputs, targets)."""
    return (output - batch[1]).square().sum(), output.numel()


def mlp(width: int = 8, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
    )


def pairs(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of width 4 and targets of width 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4, generator=generator), torch.randn(num, 2, generator=generator)


def plan_of(model: nn.Module, sample=None, world_size: int = 1, bucket_mib: float = 25.0, **options) -> Plan:
    return DataParallel(bucket_mib=bucket_mib).plan(
        Subject(model, sample), world_size, PlanOptions(**options)
    )


def alone(
    model: nn.Module,
    optimizer=SGD,
    loss=squared_error,
    max_grad_norm=None,
    *,
    loss_scaler=None,
    noise_scale=None,
    **options,
):
    """A runner of a world of one, with no process group at all."""
    return build_runner(
        plan_of(model, **options),
        model,
        optimizer=optimizer,
        loss=loss,
        max_grad_norm=max_grad_norm,
        device=torch.device("cpu"),
        group=None,
        loss_scaler=loss_scaler,
        noise_scale=noise_scale,
    )
