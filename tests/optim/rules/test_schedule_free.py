"""ScheduleFreeAdamW: what parameters hold in training and in evaluation, and its scalar state."""

from __future__ import annotations

import copy

import pytest
import torch

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import ScheduleFreeAdamW
from mlsys_engine.optim.reference import schedule_free_adamw
from tests.optim.variants import EPSILON, gradients_for


def stepped(
    steps: int, **options: float
) -> tuple[ScheduleFreeAdamW, torch.nn.Parameter, dict[str, torch.Tensor]]:
    """After `steps` steps: the optimizer, its parameter, and the float64 reference's state (x, z)."""
    parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 33))
    optimizer = ScheduleFreeAdamW([parameter], lr=0.05, **options)  # type: ignore[arg-type]
    double, state = parameter.detach().double(), dict[str, torch.Tensor]()
    for step in range(steps):
        (parameter.grad,) = gradients_for(parameter.shape, 1, seed=step)
        double = schedule_free_adamw(double, parameter.grad.double(), state, optimizer.param_groups[0])
        optimizer.step()
    return optimizer, parameter, state


def test_evaluation_shows_the_average_and_training_goes_on_with_the_same_bits() -> None:
    optimizer, parameter, state = stepped(10, warmup_steps=4)
    straight = copy.deepcopy(optimizer)
    kept = parameter.detach().clone()
    optimizer.eval()
    # |x| < 2; ten steps of a few roundings, magnified by 1 / beta1 when x is made of y and z.
    assert ((parameter - state["x"]).abs() <= 10 * 10 * EPSILON * 2).all()
    assert not torch.equal(parameter, kept)
    optimizer.eval()
    optimizer.train()
    assert torch.equal(parameter, kept)
    (twin,) = straight.param_groups[0]["params"]
    for tensor, stepper in ((parameter, optimizer), (twin, straight)):
        (tensor.grad,) = gradients_for(tensor.shape, 1, seed=99)
        stepper.step()
    assert torch.equal(parameter, twin)


def test_weights_that_were_changed_in_evaluation_are_carried_over_into_training() -> None:
    optimizer, parameter, _ = stepped(5)
    z = optimizer.state[parameter]["z"].clone()
    optimizer.eval()
    with torch.no_grad():
        parameter.fill_(0.5)
    optimizer.train()
    assert ((parameter - (0.9 * 0.5 + 0.1 * z)).abs() <= 4 * EPSILON).all()  # y of x = 0.5, beta1 = 0.9


def test_a_step_in_evaluation_is_refused_and_changes_nothing() -> None:
    optimizer, parameter, _ = stepped(2)
    optimizer.eval()
    before = parameter.detach().clone()
    with pytest.raises(ConfigError, match=r"group 0 is in evaluation.*optimizer\.train\(\)"):
        optimizer.step()
    assert torch.equal(parameter, before)
    assert optimizer.param_groups[0]["k"] == 2


def test_a_refused_gradient_leaves_the_scalar_state_as_it_was() -> None:
    optimizer, parameter, _ = stepped(2)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    parameter.grad = torch.eye(33)[0].to_sparse()
    with pytest.raises(ConfigError, match="sparse"):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"] == before


def test_evaluation_before_the_first_step_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = ScheduleFreeAdamW([parameter])
    optimizer.eval()
    optimizer.train()
    assert torch.equal(parameter, torch.ones(3))


def test_a_learning_rate_of_zero_and_a_beta1_of_zero_are_told_apart() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    ScheduleFreeAdamW([parameter], lr=0.0).step()  # no weight in the average: nothing to divide by
    assert torch.equal(parameter, torch.ones(3))
    with pytest.raises(ConfigError, match=r"betas\[0\]=0"):
        ScheduleFreeAdamW([parameter], betas=(0.0, 0.9))
