"""The native optimizers under torch.amp.GradScaler: unscaled and skipped within the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from mlsys_engine import optim
from mlsys_engine.optim import optimizer_class

PLAIN = {"enabled": False}
SCALED = {"init_scale": 2.0**10, "growth_interval": 2}


def _train(
    name: str, settings: dict[str, Any], *, unscales: bool = False, bad_step: int = -1
) -> list[Tensor]:
    """The weights after each of six steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = optimizer_class(name)(model.parameters(), lr=0.05)
    scaler, weights = GradScaler("cpu", **settings), []
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((3, 4), 0.1 * step + 0.1)).square().mean()).backward()
        if step == bad_step:
            model[0].weight.grad[0, 0] = math.nan
        if unscales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone())
    return weights


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("unscales", [False, True])
def test_scaling_by_powers_of_two_changes_no_bit(name: str, unscales: bool) -> None:
    plain, scaled = _train(name, PLAIN), _train(name, SCALED, unscales=unscales)
    assert all(torch.equal(one, other) for one, other in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("unscales", [False, True])
def test_a_bad_step_is_skipped(unscales: bool) -> None:
    weights = _train("adamw", SCALED, unscales=unscales, bad_step=3)
    assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[4], weights[3])
    assert all(one.isfinite().all() for one in weights)


def test_nothing_of_the_scaler_stays_with_the_optimizer() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer, scaler = optim.AdamW([parameter], lr=0.1), GradScaler("cpu")
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
