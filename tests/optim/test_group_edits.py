"""Edits of parameters, gradients and groups between steps: each as torch.optim takes it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from tests.optim.peers import TORCH_PEERS, make_peer
from tests.optim.variants import VARIANTS, error_bound, gradients_for, make

SHAPES = ((3, 4), (5,), (2, 3, 2), (1,))
Optimizer = torch.optim.Optimizer
Edit = Callable[[Optimizer, list[nn.Parameter]], None]


def set_options(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 3e-2
        group["weight_decay"] = 0.2
        group["maximize"] = not group["maximize"]


def set_betas_or_momentum(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.7, 0.8)
        if "momentum" in group:
            group["momentum"] = 0.3
            group["dampening"] = 0
            group["nesterov"] = True


def move_to_another_group(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    source, target = optimizer.param_groups
    target["params"].insert(0, source["params"].pop())


def add_a_group(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    params.append(nn.Parameter(torch.full((7,), 0.5)))
    optimizer.add_param_group({"params": [params[-1]], "lr": 5e-2})


def remove_a_parameter(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].pop(0)


def remove_a_group(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.pop()


def empty_a_group(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["params"] = []


def freeze_and_drop_the_gradient(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    params[0].requires_grad_(False)
    params[0].grad = None


def freeze_but_keep_the_gradient(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    params[0].requires_grad_(False)


def replace_data(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    params[0].data = torch.full(params[0].shape, 0.25)
    params[2].data = torch.arange(12.0).view(2, 2, 3).transpose(1, 2)  # and another layout


def replace_a_parameter_of_the_group(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    params[0] = nn.Parameter(torch.full(params[0].shape, 0.75))
    optimizer.param_groups[0]["params"][0] = params[0]


def change_the_shape_of_a_parameter_without_state(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    params[1].data = torch.ones(8)
    optimizer.state.pop(params[1], None)


def drop_state(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state.pop(params[1], None)


def reload_own_state(optimizer: Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EDITS: list[Edit] = [
    set_options,
    set_betas_or_momentum,
    move_to_another_group,
    add_a_group,
    remove_a_parameter,
    remove_a_group,
    empty_a_group,
    freeze_and_drop_the_gradient,
    freeze_but_keep_the_gradient,
    replace_data,
    replace_a_parameter_of_the_group,
    change_the_shape_of_a_parameter_without_state,
    drop_state,
    reload_own_state,
]


def pair(name: str, variant: dict[str, Any]) -> list[tuple[Optimizer, list[nn.Parameter]]]:
    made = []
    for factory in (make, make_peer):
        generator = torch.Generator().manual_seed(1)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 2e-2}]
        made.append((factory(name, groups, variant), params))
    return made


def step(optimizer: Optimizer, params: list[nn.Parameter], number: int) -> None:
    for index, parameter in enumerate(params):
        if parameter.requires_grad:
            parameter.grad = gradients_for(tuple(parameter.shape), 1, seed=10 * number + index)[0]
    optimizer.step()


def assert_close(name: str, optimizer: Any, ours: list[Any], theirs: list[Any], steps: int) -> None:
    groups = optimizer.param_groups
    bound = max(
        error_bound(name, group, steps=steps, smallest=0.5, largest=2.0, parameter=12.0) for group in groups
    )
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() <= 2 * bound).all()


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", TORCH_PEERS)
def test_an_edit_between_steps_is_taken_as_torch_takes_it(name: str, edit: Edit) -> None:
    (optimizer, ours), (peer, theirs) = pair(name, VARIANTS[name][-1])
    for number in range(6):
        for one, params in ((optimizer, ours), (peer, theirs)):
            if number == 3:
                edit(one, params)
            step(one, params, number)
    assert_close(name, optimizer, ours, theirs, 6)
    assert len(optimizer.state) == len(peer.state)


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_gradients_of_new_storage_layout_and_in_turn_none_are_followed(name: str) -> None:
    (optimizer, ours), (peer, theirs) = pair(name, VARIANTS[name][0])
    for number in range(6):
        for one, params in ((optimizer, ours), (peer, theirs)):
            for index, parameter in enumerate(params):
                gradient = gradients_for(tuple(parameter.shape), 1, seed=10 * number + index)[0]
                if (number + index) % 4 == 0:
                    parameter.grad = None
                elif (number + index) % 4 == 1:
                    parameter.grad = gradient.t().contiguous().t() if gradient.dim() == 2 else gradient
                elif (number + index) % 4 == 2:
                    parameter.grad = gradient.new_zeros(2, *gradient.shape)[1].copy_(gradient)
                elif parameter.grad is not None:
                    parameter.grad.copy_(gradient)
            one.step()
    assert_close(name, optimizer, ours, theirs, 6)


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_zero_grad_keeps_or_drops_gradients_as_asked(name: str) -> None:
    (optimizer, ours), (peer, theirs) = pair(name, VARIANTS[name][-1])
    for number, set_to_none in enumerate((False, True, False)):
        for one, params in ((optimizer, ours), (peer, theirs)):
            step(one, params, number)
            one.zero_grad(set_to_none=set_to_none)
            one.step()  # on zeros, or on nothing
    assert_close(name, optimizer, ours, theirs, 6)


@pytest.mark.parametrize("name", TORCH_PEERS)
def test_a_gradient_of_another_type_or_kind_is_refused_by_name_and_nothing_steps(name: str) -> None:
    for gradient, match in (
        (torch.ones(3).to_sparse(), r"gradient of second is torch\.sparse_coo"),
        (torch.ones(3, dtype=torch.complex64), "gradient of second is complex64"),
    ):
        params = [("first", nn.Parameter(torch.ones(3))), ("second", nn.Parameter(torch.ones(3)))]
        optimizer = make(name, params, {"lr": 0.1})
        for _, parameter in params:
            parameter.grad = torch.ones(3)
        optimizer.step()
        before = [parameter.detach().clone() for _, parameter in params]
        counts = copy.deepcopy(optimizer.state_dict()["state"])
        params[1][1].grad_dtype = None  # torch would otherwise refuse it itself
        params[1][1].grad = gradient
        with pytest.raises(ConfigError, match=match):
            optimizer.step()
        for (_, parameter), old in zip(params, before, strict=True):
            assert torch.equal(parameter, old)
        for key, state in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, counts[key][item]) for item, value in state.items())
