from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mlsys_engine.data_parallel import guard
from mlsys_engine.errors import ConfigError
from tests.data_parallel.models import mlp


@pytest.fixture
def model():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(2, affine=False))
    guard.guard(model)
    return model


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.half(),
        lambda model: model.to("meta"),
        lambda model: model[0][2].double(),
        lambda model: nn.ModuleList([model]).to(torch.bfloat16),
        lambda model: model.to_empty(device="cpu"),
    ],
)
def test_conversions_are_refused_with_the_way_out_and_change_nothing(model, convert):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="Convert it before"):
        convert(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "convert", [lambda model: model.to("cpu"), lambda model: model.float(), lambda model: model.cpu()]
)
def test_conversions_that_change_nothing_are_allowed(model, convert):
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert convert(model) is model
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def test_assign_is_refused_and_plain_loading_copies_in_place(model):
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="assign=True"):
        model.load_state_dict(state, assign=True)
    pointer = model[0][0].weight.data_ptr()
    model.load_state_dict(state)
    assert not model[0][0].weight.any() and model[0][0].weight.data_ptr() == pointer


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_ordinary_modules(model, copier):
    twin = copier(model)
    assert twin.double()[0][0].weight.dtype == torch.float64
    assert model[0][0].weight.dtype == torch.float32
    twin.load_state_dict({name: tensor.clone() for name, tensor in twin.state_dict().items()}, assign=True)


def test_a_module_belongs_to_one_runner_until_it_is_released(model):
    with pytest.raises(ConfigError, match="already laid out"):
        guard.check_unguarded(nn.Sequential(model))
    guard.release(model)
    guard.check_unguarded(model)
    assert model.double()[0][0].weight.dtype == torch.float64
