"""Dynamic loss scaling: torch's growth rule, one step for every kind of optimizer, and the state."""

from __future__ import annotations

import copy
import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from mlsys_engine import optim
from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.optim import LossScaler

OPTIMIZERS: dict[str, Any] = {
    "AdamW": partial(optim.AdamW, lr=0.05),
    "SGD": partial(optim.SGD, lr=0.05, momentum=0.9),
    "torch's AdamW": partial(torch.optim.AdamW, lr=0.05),
    "torch's fused AdamW": partial(torch.optim.AdamW, lr=0.05, fused=True),
    "torch's SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}
SMALL = {"init_scale": 64.0, "growth_interval": 3}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def _loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)
    return (model(inputs) - targets).square().mean()


def _poison(model: nn.Module, value: float) -> None:
    next(model.parameters()).grad.view(-1)[3] = value


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("seed", range(5))
def test_the_scale_follows_the_sequence_of_torchs_scaler(seed: int) -> None:
    choose = random.Random(seed)
    settings = {
        "init_scale": 2.0 ** choose.randint(-3, 20),
        "growth_factor": choose.choice([2.0, 1.5, 3.0]),
        "backoff_factor": choose.choice([0.5, 0.25, 0.7]),
        "growth_interval": choose.randint(1, 4),
    }
    ours, theirs = LossScaler(**settings), GradScaler("cpu", **settings)
    for step in range(60):
        bad = choose.random() < 0.25
        for scaler in (ours, theirs):
            parameter = nn.Parameter(torch.ones(3))
            scaler.scale(parameter.sum()).backward()
            if bad:
                parameter.grad[1] = choose.choice([math.inf, math.nan, -math.inf])
            scaler.step(torch.optim.SGD([parameter], lr=1.0))
            scaler.update()
        assert ours.get_scale() == theirs.get_scale(), step
        assert ours.state_dict() == theirs.state_dict()


def test_the_scale_stops_growing_at_the_end_of_float32_as_torchs_does() -> None:
    ours = LossScaler(init_scale=2.0**126, growth_interval=1)
    theirs = GradScaler("cpu", init_scale=2.0**126, growth_interval=1)
    for _ in range(4):
        for scaler in (ours, theirs):
            parameter = nn.Parameter(torch.zeros(1))
            scaler.scale((parameter * 0).sum()).backward()
            scaler.step(torch.optim.SGD([parameter], lr=1.0))
            scaler.update()
    assert ours.get_scale() == theirs.get_scale() == 2.0**127


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_a_scaled_step_is_the_plain_one(kind: str, max_grad_norm: float | None) -> None:
    scaled, plain = _model(), _model()
    scaler, one = LossScaler(**SMALL), LossScaler(enabled=False)
    steppers = [(scaled, scaler, OPTIMIZERS[kind](scaled.parameters())),
                (plain, one, OPTIMIZERS[kind](plain.parameters()))]  # fmt: skip
    for step in range(8):
        norms = []
        for model, own, optimizer in steppers:
            optimizer.zero_grad()
            own.scale(_loss(model, step)).backward()
            norms.append(own.step(optimizer, max_grad_norm))
            own.update()
        # Powers of two scale without rounding; a reciprocal in float32 (fused) rounds the factor once a step.
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0.0)
    assert scaler.get_scale() > 64.0
    torch.testing.assert_close(_weights(scaled), _weights(plain), rtol=1e-5, atol=1e-7)


def test_without_clipping_a_power_of_two_changes_no_bit() -> None:
    scaled, plain = _model(), _model()
    ours, plainly = optim.AdamW(scaled.parameters()), optim.AdamW(plain.parameters())
    scaler = LossScaler(**SMALL)
    for step in range(8):
        ours.zero_grad()
        plainly.zero_grad()
        scaler.scale(_loss(scaled, step)).backward()
        scaler.step(ours)
        scaler.update()
        _loss(plain, step).backward()
        plainly.step()
    assert torch.equal(_weights(scaled), _weights(plain))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bad_gradient_skips_the_step_and_lowers_the_scale(kind: str, value: float) -> None:
    model, scaler = _model(), LossScaler(**SMALL)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(_loss(model, step)).backward()
        if step == 1:
            _poison(model, value)
            before, state = _weights(model), copy.deepcopy(optimizer.state_dict())
        norm = scaler.step(optimizer, max_grad_norm=1.0)
        scaler.update()
    assert not norm.isfinite()
    assert torch.equal(_weights(model), before)
    assert scaler.get_scale() == 32.0
    for index, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(values[key]), torch.as_tensor(old))
                   for key, old in state["state"][index].items())  # fmt: skip


def test_one_bad_optimizer_of_two_lowers_the_scale_and_the_other_steps() -> None:
    good, bad, scaler = _model(), _model(), LossScaler(**SMALL)
    before = _weights(good)
    for model in (good, bad):
        scaler.scale(_loss(model, 0)).backward()
    _poison(bad, math.nan)
    for model in (bad, good):
        scaler.step(optim.SGD(model.parameters(), lr=0.1))
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert torch.equal(_weights(bad), before) and not torch.equal(_weights(good), before)


def test_a_half_precision_loss_is_scaled_in_float32() -> None:
    loss = torch.tensor(3.0, dtype=torch.float16, requires_grad=True)
    scaled = LossScaler(init_scale=2.0**16).scale(loss)
    assert scaled.dtype == torch.float32 and scaled.item() == 3.0 * 2.0**16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_and_gradients_in_half_precision_are_unscaled_in_float32(dtype: torch.dtype) -> None:
    scaled, plain = _model().to(dtype), _model().to(dtype)
    ours, plainly = (optim.AdamW(model.parameters(), lr=0.01) for model in (scaled, plain))
    scaler = LossScaler(init_scale=2.0**6, growth_interval=100)
    gradients = [torch.randn_like(parameter) for parameter in plain.parameters()]
    for one, other, gradient in zip(scaled.parameters(), plain.parameters(), gradients, strict=True):
        one.grad, other.grad = gradient * 2.0**6, gradient
    scaler.scale(torch.ones(()))
    norm = scaler.step(ours)
    plainly.step()
    exact = sum(gradient.double().square().sum() for gradient in gradients)
    assert norm.item() == pytest.approx(math.sqrt(exact), rel=1e-12)
    assert torch.equal(_weights(scaled), _weights(plain))
    one.grad[0] = math.inf
    assert not scaler.step(ours).isfinite()


def test_scaling_testing_and_updating_read_no_value() -> None:
    # Tensors on the meta device have none: reading one raises.
    scaler = LossScaler()
    for _ in range(3):
        loss = scaler.scale(torch.empty((), device="meta"))
        scaler.observe(~torch.isfinite(loss))
        scaler.observe(~torch.isfinite(loss))
        scaler.update()
    assert scaler.current("meta").is_meta


def test_a_disabled_scaler_neither_scales_nor_skips_but_clips() -> None:
    parameter, scaler = nn.Parameter(torch.zeros(1)), LossScaler(enabled=False)
    loss = (3.0 * parameter).sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    assert scaler.step(torch.optim.SGD([parameter], lr=1.0), max_grad_norm=1.0).item() == 3.0
    assert parameter.item() == pytest.approx(-1.0, rel=1e-6)
    scaler.update()
    assert scaler.get_scale() == 1.0 and scaler.state_dict() == {}


def test_the_state_goes_to_and_from_torchs_scaler() -> None:
    ours = LossScaler(**SMALL)
    for step in range(4):
        model = _model()
        ours.scale(_loss(model, step)).backward()
        ours.step(optim.SGD(model.parameters(), lr=0.1))
        ours.update()
    theirs, again = GradScaler("cpu"), LossScaler()
    theirs.load_state_dict(ours.state_dict())
    again.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == again.state_dict()
    assert (ours.get_scale(), ours.state_dict()["_growth_tracker"]) == (128.0, 1)
    again.scale(torch.ones(()))
    assert again.state_dict() == ours.state_dict()
    with pytest.raises(CheckpointError, match="without _growth_tracker"):
        again.load_state_dict({key: value for key, value in ours.state_dict().items() if key[0] != "_"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"init_scale": math.inf}, "init_scale=inf"),
        ({"growth_factor": 1.0}, "above 1"),
        ({"backoff_factor": 1.0}, "between 0 and 1"),
        ({"growth_interval": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossScaler(**settings)


def test_an_update_without_a_step_and_a_norm_of_zero_are_refused() -> None:
    scaler = LossScaler()
    with pytest.raises(ConfigError, match="without a step"):
        scaler.update()
    with pytest.raises(ConfigError, match="max_grad_norm=0"):
        scaler.step(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), max_grad_norm=0)
