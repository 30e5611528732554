from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from mlsys_engine.errors import CheckpointError
from tests.data_parallel.models import alone, mlp, pairs, squared_error

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01)


def _tied():
    torch.manual_seed(1)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    model["b"].weight = model["a"].weight
    model.forward = lambda x: model["norm"](model["b"](model["a"](x)))
    return model


def _losses(runner, num_steps, first=0):
    return [runner.step([pairs(6, seed=step)]).loss.item() for step in range(first, first + num_steps)]


def test_the_model_part_has_plain_names_buffers_and_both_names_of_a_tie():
    model = _tied()
    names = list(model.state_dict())
    runner = alone(model)
    for full in (False, True):
        assert list(runner.state_dict(full)["model"]) == names


def test_live_tensors_follow_training_and_full_copies_do_not():
    runner = alone(mlp(), optimizer=ADAMW)
    live, full = runner.state_dict()["model"], runner.state_dict(full=True)["model"]
    before = {name: tensor.clone() for name, tensor in full.items()}
    _losses(runner, 1)
    assert all(torch.equal(full[name], before[name]) for name in full)
    assert not any(torch.equal(live[name], before[name]) for name in live)
    fresh = mlp(seed=5)
    fresh.load_state_dict(runner.state_dict(full=True)["model"])
    assert all(torch.equal(fresh.state_dict()[name], live[name]) for name in live)


def test_full_copies_of_tied_names_share_memory():
    state = alone(_tied()).state_dict(full=True)["model"]
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()


def test_optimizer_state_is_keyed_by_parameter_name():
    def factory(named):
        decay = [item for item in named if item[0].endswith("weight")]
        rest = [item for item in named if not item[0].endswith("weight")]
        return torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.01)

    runner = alone(mlp(), optimizer=factory)
    _losses(runner, 1)
    state = runner.state_dict()["optimizer"]
    assert state["param_groups"][0]["params"] == ["0.weight", "2.weight", "4.weight"]
    assert state["param_groups"][1]["weight_decay"] == 0.0
    assert set(state["state"]["0.bias"]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("full", [False, True])
def test_a_run_goes_on_from_its_state_bit_for_bit(full):
    first = alone(mlp(), optimizer=ADAMW)
    _losses(first, 3)
    state = copy.deepcopy(first.state_dict(full))
    expected = _losses(first, 3, first=3)
    second = alone(mlp(seed=9), optimizer=functools.partial(torch.optim.AdamW, lr=5.0))
    second.load_state_dict(state)
    assert _losses(second, 3, first=3) == expected


def test_loading_leaves_the_given_tensors_alone():
    first, second = alone(mlp(), optimizer=ADAMW), alone(mlp(seed=9), optimizer=ADAMW)
    _losses(first, 1)
    state = first.state_dict(full=True)
    before = copy.deepcopy(state)
    second.load_state_dict(state)
    _losses(second, 2)
    for name, values in before["optimizer"]["state"].items():
        for key, value in values.items():
            assert torch.equal(state["optimizer"]["state"][name][key], value)


def test_one_name_of_a_tie_is_enough():
    state = alone(_tied()).state_dict(full=True)["model"]
    state["b.weight"] = torch.ones(4, 4)
    del state["a.weight"]
    runner = alone(_tied())
    runner.load_state_dict({"model": state})
    assert runner.model["a"].weight.detach().eq(1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["model"].pop("0.weight"), r"without 0\.weight"),
        (lambda state: state["model"].update(extra=torch.zeros(1)), "with unexpected extra"),
        (lambda state: state["model"].update({"0.bias": torch.zeros(3)}), r"0\.bias has shape \(3,\)"),
        (lambda state: state["optimizer"]["param_groups"][0]["params"].pop(), "parameter groups of"),
        (lambda state: state["optimizer"]["state"].update(extra={}), "with unexpected extra"),
        (lambda state: state.pop("model"), "keys"),
        (lambda state: state.update(more=1), "keys"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    runner = alone(mlp(), optimizer=ADAMW)
    _losses(runner, 1)
    state = copy.deepcopy(runner.state_dict(full=True))
    change(state)
    with pytest.raises(CheckpointError, match=message):
        runner.load_state_dict(state)


def test_nothing_changes_when_the_model_part_does_not_fit():
    runner = alone(mlp())
    before = runner.state_dict(full=True)["model"]
    wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    wrong["4.bias"] = torch.zeros(9)
    with pytest.raises(CheckpointError):
        runner.load_state_dict({"model": wrong})
    assert all(torch.equal(tensor, before[name]) for name, tensor in runner.state_dict()["model"].items())


def test_weights_alone_are_loaded_without_an_optimizer_state():
    runner, weights = alone(mlp(), loss=squared_error), mlp(seed=3).state_dict()
    runner.load_state_dict({"model": weights})
    assert all(torch.equal(value, weights[name]) for name, value in runner.state_dict()["model"].items())
