"""What code written for torch.optim relies on: groups, closures, schedulers, hooks, tensor rates."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import OPTIMIZERS, SGD, Adagrad, Adam, AdamW, optimizer_class
from tests.optim.variants import EPSILON


def twins(*shapes: tuple[int, ...]) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    return ours, copy.deepcopy(ours)


def set_gradients(*families: list[torch.nn.Parameter], seed: int) -> None:
    for family in families:
        generator = torch.Generator().manual_seed(seed)
        for parameter in family:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def assert_close(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], steps: int) -> None:
    # Well-conditioned data (the contract test has the derived bound): a few dozen roundings a step at most.
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() <= 40 * steps * EPSILON * (1.0 + b.abs())).all()


def test_groups_keep_their_own_options_and_can_be_edited_between_steps() -> None:
    ours, theirs = twins((3,), (4,), (5,))
    pairs = []
    for cls, params in ((AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = cls(
            [{"params": params[:1], "lr": 0.1}, {"params": params[1:2], "weight_decay": 0.5}], lr=1e-2
        )
        pairs.append(optimizer)
    for step in range(6):
        set_gradients(ours, theirs, seed=step)
        for optimizer, params in zip(pairs, (ours, theirs), strict=True):
            if step == 2:
                optimizer.add_param_group({"params": [params[2]], "eps": 1e-4})
            if step == 3:
                optimizer.param_groups[0]["lr"] = 0.02
                optimizer.param_groups[1]["betas"] = (0.5, 0.7)
            if step == 4:
                optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
            optimizer.step()
    assert_close(ours, theirs, 6)


def test_momentum_switched_on_and_off_between_steps_behaves_as_in_torch() -> None:
    ours, theirs = twins((5,), (6,))
    optimizers = SGD(ours, lr=0.1, dampening=0.2), torch.optim.SGD(theirs, lr=0.1, dampening=0.2)
    for step, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.9)):
        set_gradients(ours, theirs, seed=step)
        for optimizer in optimizers:
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.step()
    assert_close(ours, theirs, 5)


def test_groups_with_and_without_momentum_share_a_step() -> None:
    ours, theirs = twins((5,), (6,))
    optimizers = [
        cls([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}], lr=0.1)
        for cls, params in ((SGD, ours), (torch.optim.SGD, theirs))
    ]
    for step in range(3):
        set_gradients(ours, theirs, seed=step)
        for optimizer in optimizers:
            optimizer.step()
    assert_close(ours, theirs, 3)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_closure_runs_with_gradients_enabled_and_its_loss_is_returned() -> None:
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD([parameter], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 4.0
    assert parameter.item() == pytest.approx(2.0 - 0.1 * 4.0, rel=4 * EPSILON)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_as_a_tensor_can_be_changed_in_place(name: str) -> None:
    cls: Any = optimizer_class(name)
    ours, theirs = twins((7,))
    rate = torch.tensor(0.1)
    optimizer, plain = cls(ours, lr=rate), cls(theirs, lr=0.1)
    for step in range(3):
        set_gradients(ours, theirs, seed=step)
        rate.fill_(0.1 / (step + 1))
        plain.param_groups[0]["lr"] = rate.item()
        optimizer.step()
        plain.step()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("which", ["cosine", "one_cycle"])
@pytest.mark.parametrize(
    ("ours_cls", "theirs_cls", "options"),
    [
        (AdamW, torch.optim.AdamW, {}),
        (SGD, torch.optim.SGD, {"momentum": 0.9}),
        (Adam, torch.optim.Adam, {"weight_decay": 0.01}),
    ],
)
def test_torch_schedulers_drive_rates_betas_and_momentum(
    which: str, ours_cls: Any, theirs_cls: Any, options: dict[str, Any]
) -> None:
    ours, theirs = twins((7,))
    optimizers = ours_cls(ours, lr=0.05, **options), theirs_cls(theirs, lr=0.05, **options)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8)
        if which == "one_cycle"
        else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
        for optimizer in optimizers
    ]
    for step in range(7):
        set_gradients(ours, theirs, seed=step)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert_close(ours, theirs, 7)


def test_scaled_steps_count_as_steps_for_schedulers() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = AdamW([parameter])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step_scaled(grad_scale=0.5)
        scheduler.step()


def test_step_hooks_run_around_both_kinds_of_step() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = AdamW([parameter])
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    optimizer.step_scaled()
    assert calls == ["before", "after"] * 2


def test_a_step_invalidates_a_graph_that_saved_the_parameter() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    loss = parameter.square().sum()
    parameter.grad = torch.ones(3)
    AdamW([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_replaced_parameter_data_and_state_are_noticed() -> None:
    ours, theirs = twins((7,), (9,))
    optimizer, plain = AdamW(ours), torch.optim.AdamW(theirs, lr=1e-3)
    for step in range(8):
        set_gradients(ours, theirs, seed=step)
        for params, stepper in ((ours, optimizer), (theirs, plain)):
            if step == 2:
                params[0].data = torch.full((7,), 0.5)
            if step == 4:
                stepper.state[params[1]]["exp_avg"] = torch.full((9,), 0.25)
            if step == 5:
                stepper.state[params[1]]["exp_avg"].data = torch.full((9,), 0.125)
            if step == 6:
                stepper.state.clear()
            if step == 7:
                stepper.state[params[0]]["step"] = torch.tensor(40.0)
            stepper.step()
    assert_close(ours, theirs, 8)


def test_grad_scaler_of_torch_unscales_and_skips() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(parameter, torch.zeros(3))
    parameter.grad = torch.full((3,), torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(parameter, torch.zeros(3))


def test_step_without_any_gradient_does_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter])
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1e-8},
        {"master": "half"},
        {"moments": "int4"},
        {"ema": 1.0},
    ],
)
def test_adamw_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AdamW([torch.nn.Parameter(torch.ones(2))], **options)


def test_adagrads_state_of_narrow_parameters_without_a_step_is_float32() -> None:
    stepped, waiting = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = Adagrad([stepped, waiting], initial_accumulator_value=0.1)
    stepped.grad = torch.ones_like(stepped)
    optimizer.step()
    initial = optimizer.state_dict()["state"][1]["sum"]
    assert torch.equal(initial, torch.full((3,), 0.1)) and not initial.requires_grad


def test_adagrads_state_of_parameters_without_a_step_is_what_torch_gives_them() -> None:
    ours, theirs = twins((3,), (4,))
    optimizer, peer = Adagrad(ours, initial_accumulator_value=0.5), torch.optim.Adagrad(theirs)
    set_gradients(ours[:1], seed=0)
    optimizer.step()
    theirs[0].data.copy_(ours[0].data)
    saved = optimizer.state_dict()
    assert torch.equal(saved["state"][1]["sum"], torch.full((4,), 0.5))
    peer.load_state_dict(copy.deepcopy(saved))
    again = Adagrad(copy.deepcopy(ours))
    again.load_state_dict(copy.deepcopy(saved))
    third = again.param_groups[0]["params"]
    for step in range(3):
        set_gradients(ours, theirs, third, seed=step)
        for stepper in (optimizer, peer, again):
            stepper.step()
    assert_close(ours, theirs, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, third, strict=True))


def test_differentiable_state_of_torch_is_refused_and_nothing_is_loaded() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([parameter], lr=0.5)
    saved = torch.optim.AdamW([parameter], differentiable=True).state_dict()
    with pytest.raises(ConfigError, match="differentiable"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    ],
)
def test_sgd_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SGD([torch.nn.Parameter(torch.ones(2))], **options)
