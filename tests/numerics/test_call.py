from __future__ import annotations

from collections import UserDict

import pytest
import torch
from torch import nn

from mlsys_engine.errors import DataError
from mlsys_engine.numerics import call_model, num_samples, to_device


class Strict(nn.Module):
    def forward(self, x, scale=1.0):
        return x * scale


class Anything(nn.Module):
    def forward(self, **kwargs):
        return kwargs


def test_a_mapping_becomes_keyword_arguments():
    assert call_model(Strict(), {"x": 2.0, "scale": 3.0}, with_loss=False) == 6.0
    assert call_model(Strict(), UserDict({"x": 2.0}), with_loss=False) == 2.0


def test_keys_that_forward_does_not_accept_are_dropped_only_for_a_loss_function():
    batch = {"x": 2.0, "target": 1.0}
    assert call_model(Strict(), batch, with_loss=True) == 2.0
    with pytest.raises(DataError, match=r"Strict\.forward .* keys x, target.* Pass loss="):
        call_model(Strict(), batch, with_loss=False)
    assert call_model(Anything(), batch, with_loss=True) == batch


def test_a_sequence_becomes_positions_and_its_first_element_with_a_loss_function():
    assert call_model(Strict(), (2.0, 3.0), with_loss=False) == 6.0
    assert call_model(Strict(), [2.0, 3.0], with_loss=True) == 2.0


def test_a_batch_that_does_not_fit_forward_is_told_as_such_and_the_models_own_errors_stay():
    with pytest.raises(DataError, match="3 positional arguments, from the batch: too many"):
        call_model(Strict(), (1.0, 2.0, 3.0), with_loss=False)
    with pytest.raises(TypeError, match="unsupported operand"):
        call_model(Strict(), (1.0, {}), with_loss=False)


def test_anything_else_is_the_one_argument():
    x = torch.ones(2)
    assert torch.equal(call_model(Strict(), x, with_loss=False), x)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(4), torch.zeros(5)), 4),
        ({"name": "text", "scale": torch.tensor(1.0), "x": torch.zeros(6, 1)}, 6),
        ({"inputs": {"x": [torch.zeros(7)]}}, 7),
        ("text", 1),
    ],
)
def test_the_number_of_samples_is_the_first_dim_of_the_first_tensor(batch, expected):
    assert num_samples(batch) == expected


def test_moving_to_a_device_keeps_structure_and_what_is_there_already():
    x = torch.zeros(2)
    moved = to_device(UserDict({"x": x, "nested": (x, "text")}), torch.device("cpu"))
    assert moved["x"] is x and moved["nested"][0] is x and moved["nested"][1] == "text"
    assert to_device((x,), torch.device("meta"))[0].is_meta
