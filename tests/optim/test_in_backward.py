"""Stepping inside the backward: the bits of an ordinary step, gradients freed at once, two ways to clip."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import (
    OPTIMIZERS,
    NativeOptimizer,
    clip_scale,
    device_steps,
    optimizer_class,
    parameter_step,
    step_in_backward,
)
from tests.optim.variants import every_variant, make

WIDTH = 9
SEPARABLE = [param for param in every_variant() if optimizer_class(param.values[0]).separable]


class Tied(nn.Module):
    """Layers of odd sizes; one weight serves two places, one parameter nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 70)
        self.middle = nn.Linear(70, 70)
        self.last = nn.Linear(WIDTH, 70, bias=False)
        self.last.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return hidden @ self.last.weight + self.last(x).sum()


def model() -> nn.Module:
    torch.manual_seed(3)
    return Tied()


def loss_of(net: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return net(torch.randn(4, WIDTH, generator=generator)).square().mean()


def assert_same(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(a, b), name


def assert_same_state(left: NativeOptimizer, right: NativeOptimizer) -> None:
    ours, theirs = left.state_dict()["state"], right.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key, values in ours.items():
        for name, value in values.items():
            assert torch.equal(value, theirs[key][name]), (key, name)


def pair(name: str, variant: dict[str, Any]) -> tuple[nn.Module, NativeOptimizer, nn.Module, NativeOptimizer]:
    ours, plain = model(), model()
    return ours, make(name, ours.parameters(), variant), plain, make(name, plain.parameters(), variant)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("name", "variant"), SEPARABLE)
def test_weights_and_state_have_the_bits_of_ordinary_steps(
    name: str, variant: dict[str, Any], accumulate: int
) -> None:
    ours, optimizer, plain, ordinary = pair(name, variant)
    step_in_backward(optimizer, accumulate=accumulate)
    for number in range(2 * accumulate):
        loss_of(ours, number).backward()
        loss_of(plain, number).backward()
        if (number + 1) % accumulate == 0:
            ordinary.step()
            ordinary.zero_grad()
            assert all(parameter.grad is None for parameter in ours.parameters())
    assert_same(ours, plain)
    assert_same_state(optimizer, ordinary)


@pytest.mark.parametrize(("name", "variant"), SEPARABLE)
def test_two_passes_clip_with_the_bits_of_norm_then_scaled_step(name: str, variant: dict[str, Any]) -> None:
    ours, optimizer, plain, ordinary = pair(name, variant)
    handle = step_in_backward(optimizer, max_grad_norm=1e-2, clip="two_pass", accumulate=2)
    calls = []

    def closure() -> float:
        calls.append(torch.rand(()).item())
        losses = [loss_of(ours, number) for number in (5, 6)]
        for loss in losses:
            loss.backward()
        return sum(losses).item()

    for _ in range(2):
        first = sum(loss_of(ours, number) for number in (5, 6)).item()
        assert handle.step(closure) == first  # the loss before the step
        for number in (5, 6):
            loss_of(plain, number).backward()
        total = ordinary.sum_of_squares()
        ordinary.step_scaled(grad_scale=clip_scale(total, 1e-2))
        ordinary.zero_grad()
        assert handle.grad_norm is not None
        assert torch.equal(handle.grad_norm, total.sqrt())
    assert_same(ours, plain)
    assert_same_state(optimizer, ordinary)
    assert len(calls) == 4
    assert calls[0] == calls[1] != calls[2]  # both passes draw the same numbers


@pytest.mark.parametrize(("name", "variant"), SEPARABLE)
def test_clipping_by_the_previous_norm_measures_first_and_then_lags_one_step(
    name: str, variant: dict[str, Any]
) -> None:
    ours, optimizer, plain, ordinary = pair(name, variant)
    handle = step_in_backward(optimizer, max_grad_norm=1e-2, clip="previous")
    previous = None
    for number in range(4):
        loss_of(ours, number).backward()
        loss_of(plain, number).backward()
        total = ordinary.sum_of_squares()
        if previous is not None:
            ordinary.step_scaled(grad_scale=clip_scale(previous, 1e-2))
        ordinary.zero_grad()
        previous = total
        assert torch.equal(handle.grad_norm, total.sqrt())  # type: ignore[arg-type]
        assert_same(ours, plain)
    assert_same_state(optimizer, ordinary)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e-2}])
def test_the_devices_way_of_stepping_gives_the_same_bits(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the CPU's kernel behind the device's operator: scalars in tensors, tables sent."""
    ours, optimizer, plain, ordinary = pair("adamw", {"lr": 0.1})
    step_in_backward(ordinary, **options)
    with monkeypatch.context() as patch:
        patch.setattr(parameter_step, "make_device_step", device_steps.CudaStep)
        step_in_backward(optimizer, **options)
        for number in range(3):
            loss_of(ours, number).backward()
    for number in range(3):
        loss_of(plain, number).backward()
    assert_same(ours, plain)
    assert_same_state(optimizer, ordinary)


def test_a_handle_restored_from_its_state_goes_on_with_the_same_norm() -> None:
    ours, optimizer, other, again = pair("adamw", {"lr": 0.1})
    handle = step_in_backward(optimizer, max_grad_norm=1e-2)
    for number in range(2):
        loss_of(ours, number).backward()
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_in_backward(again, max_grad_norm=1e-2).load_state_dict(handle.state_dict())
    loss_of(ours, 2).backward()
    loss_of(other, 2).backward()
    assert_same(ours, other)


def test_no_more_than_one_layers_gradients_live_at_once() -> None:
    """Counted from hooks of our own, which run after those of the handle: what is left is what is held."""

    def peak(inside: bool) -> int:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(8)))
        optimizer = make("adamw", net.parameters(), {"lr": 0.1})
        if inside:
            step_in_backward(optimizer)
        alive = []
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in net.parameters()))
            )
        loss_of(net, 0).backward()
        return max(alive)

    assert peak(inside=False) == 16
    assert peak(inside=True) <= 1  # the weight and the bias of a layer do not even meet


@pytest.fixture
def broken() -> Iterator[Any]:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("broken on purpose")

    return Broken.apply


def test_a_backward_that_raises_is_not_counted(broken: Any) -> None:
    ours, optimizer, plain, ordinary = pair("sgd", {"lr": 0.1})
    step_in_backward(optimizer, accumulate=2)
    for net in (ours, plain):
        with pytest.raises(RuntimeError, match="broken on purpose"):
            net.middle(broken(net.first(torch.ones(2, WIDTH)))).sum().backward()
    for number in range(2):
        loss_of(ours, number).backward()
        loss_of(plain, number).backward()
        assert (ours.middle.weight.grad is None) == (number == 1)
    ordinary.step()
    assert_same(ours, plain)
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_a_parameter_that_only_an_earlier_microbatch_used_is_stepped_too() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = make("sgd", weights, {"lr": 1.0})
    step_in_backward(optimizer, accumulate=2)
    (weights[0].sum() + weights[1].sum()).backward()
    weights[0].sum().backward()
    assert torch.equal(weights[0], torch.full((3,), -1.0))
    assert torch.equal(weights[1], torch.zeros(3))
    assert weights[1].grad is None


def test_flush_steps_what_the_last_microbatches_have_left() -> None:
    weight = nn.Parameter(torch.ones(3))
    handle = step_in_backward(make("sgd", [weight], {"lr": 1.0}), accumulate=3)
    for _ in range(4):
        weight.sum().backward()
    assert torch.equal(weight, torch.full((3,), -2.0))
    handle.flush()
    handle.flush()
    assert torch.equal(weight, torch.full((3,), -3.0))
    for _ in range(3):
        weight.sum().backward()
    assert torch.equal(weight, torch.full((3,), -6.0))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_never_enters_a_clipped_step(bad: float) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = make("adamw", weights, {"lr": 0.1})
    handle = step_in_backward(optimizer, max_grad_norm=1.0)
    (weights[0].sum() + weights[1].sum()).backward()  # measures
    (weights[0].sum() + bad * weights[1].sum()).backward()
    assert (weights[0] < 1.0).all()
    assert torch.equal(weights[1], torch.ones(3))
    assert optimizer.state[weights[0]]["step"] == 1
    assert optimizer.state[weights[1]]["step"] == 0
    assert not handle.grad_norm.isfinite()  # type: ignore[union-attr]
    (weights[0].sum() + weights[1].sum()).backward()  # clipped by the last finite norm
    assert optimizer.state[weights[0]]["step"] == 2
    assert all(weight.isfinite().all() for weight in weights)


def test_two_passes_step_nothing_when_the_norm_is_not_finite() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = make("adamw", weights, {"lr": 0.1})
    handle = step_in_backward(optimizer, max_grad_norm=1.0, clip="two_pass")

    def closure() -> None:
        (weights[0].sum() + torch.inf * weights[1].sum()).backward()

    handle.step(closure)
    assert all(torch.equal(weight, torch.ones(3)) and weight.grad is None for weight in weights)
    assert optimizer.state_dict()["state"] == {}


def test_schedulers_and_edits_of_groups_between_backwards_are_followed() -> None:
    ours, optimizer, plain, ordinary = pair("adamw", {"lr": 0.1})
    step_in_backward(optimizer)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(one, T_max=8) for one in (optimizer, ordinary)]
    for number in range(6):
        for net, stepper, scheduler in zip((ours, plain), (optimizer, ordinary), schedulers, strict=True):
            loss_of(net, number).backward()
            if stepper is ordinary:
                ordinary.step()
                ordinary.zero_grad()
            scheduler.step()
            if number == 1:
                stepper.param_groups[0]["betas"] = (0.5, 0.6)
            if number == 2:  # another group takes a parameter over
                moved = stepper.param_groups[0]["params"].pop()
                stepper.param_groups.append({**stepper.param_groups[0], "params": [moved], "lr": 0.3})
            if number == 3:  # a parameter leaves
                del stepper.param_groups[0]["params"][1]
            if number == 4:  # and one is frozen
                net.middle.bias.requires_grad_(False)
                net.first.weight.grad = None
    assert_same(ours, plain)
    assert ours.first.weight.grad is not None  # nobody's now: it accumulates as ever


def test_a_parameter_that_joins_or_thaws_is_stepped_from_its_first_gradient() -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    weights[1].requires_grad_(False)
    optimizer = make("sgd", weights[:2], {"lr": 1.0})
    step_in_backward(optimizer)
    weights[0].sum().backward()
    weights[1].requires_grad_(True)
    optimizer.add_param_group({"params": [weights[2]], "lr": 0.5})
    for _ in range(2):
        sum(weight.sum() for weight in weights).backward()
    assert [weight[0].item() for weight in weights] == [-2.0, -1.0, 0.0]


def test_after_remove_gradients_stay_and_step_is_the_users() -> None:
    weight = nn.Parameter(torch.ones(3))
    with step_in_backward(make("sgd", [weight], {"lr": 1.0})):
        weight.sum().backward()
    weight.sum().backward()
    assert torch.equal(weight, torch.zeros(3))
    assert weight.grad is not None


def test_checkpointed_layers_step_once_a_backward() -> None:
    ours, optimizer, plain, ordinary = pair("adamw", {"lr": 0.1})
    step_in_backward(optimizer)
    for number in range(2):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
        torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False).square().mean().backward()
        plain(x).square().mean().backward()
        ordinary.step()
        ordinary.zero_grad()
    assert_same(ours, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 0},
        {"accumulate": 1.5},
        {"clip": "exact", "max_grad_norm": 1.0},
        {"clip": "two_pass"},
        {"max_grad_norm": 0.0},
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        step_in_backward(make("sgd", [nn.Parameter(torch.ones(2))], {}), **options)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not optimizer_class(name).separable])
def test_rules_whose_step_is_more_than_their_parameters_own_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="each parameter by itself"):
        step_in_backward(make(name, [nn.Parameter(torch.ones(2, 2))], {}))


def test_an_optimizer_of_torchs_own_is_refused() -> None:
    theirs: Any = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(ConfigError, match=r"torch\.optim.*AdamW.*engine's own"):
        step_in_backward(theirs)


def test_misuse_of_the_two_passes_is_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = make("sgd", [weight], {"lr": 1.0})
    with step_in_backward(optimizer) as handle, pytest.raises(ConfigError, match="two_pass"):
        handle.step(lambda: None)
    handle = step_in_backward(optimizer, max_grad_norm=1.0, clip="two_pass", accumulate=2)
    with pytest.raises(ConfigError, match="outside"):
        weight.sum().backward()
    with pytest.raises(ConfigError, match="accumulate=2"):
        handle.step(lambda: weight.sum().backward())
    with pytest.raises(ConfigError, match="flush"):
        handle.flush()


def test_a_rule_that_keeps_more_than_parameters_state_is_refused() -> None:
    optimizer = make("schedule_free_adamw", [nn.Parameter(torch.ones(2))], {})
    with pytest.raises(ConfigError, match=r"with ScheduleFreeAdamW.*step after the backward"):
        step_in_backward(optimizer)
