"""Adafactor against torch's own, on shapes that are cut into many blocks, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.optim import Adafactor
from tests.optim.variants import VARIANTS, error_bound, gradients_for

# A scalar, a vector of several chunks, tall (several blocks of rows), wide, a stack of matrices.
SHAPES = ((), (20_000,), (300, 7), (5, 3000), (2, 3, 70, 4))


def twins() -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    return ours, copy.deepcopy(ours)


def set_gradients(step: int, *families: list[torch.nn.Parameter]) -> None:
    for family in families:
        for number, parameter in enumerate(family):
            (parameter.grad,) = gradients_for(parameter.shape, 1, seed=100 * step + number)


@pytest.mark.parametrize("variant", VARIANTS["adafactor"])
def test_a_hundred_steps_agree_with_torch(variant: dict[str, Any]) -> None:
    ours, theirs = twins()
    optimizer, peer = Adafactor(ours, **variant), torch.optim.Adafactor(theirs, **variant)
    for step in range(100):
        set_gradients(step, ours, theirs)
        optimizer.step()
        peer.step()
    largest = max(parameter.abs().max().item() for parameter in ours)
    bound = error_bound(
        "adafactor",
        optimizer.param_groups[0],
        steps=100,
        smallest=0.5,
        largest=2.0,
        parameter=max(4.0, largest),
    )
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() <= 2 * bound).all()
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)  # far inside the bound for these data


def test_torchs_state_is_taken_over_and_given_back() -> None:
    ours, theirs = twins()
    optimizer, peer = Adafactor(ours), torch.optim.Adafactor(theirs)
    for step in range(3):
        set_gradients(step, theirs)
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b.data)
    optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    set_gradients(3, ours, theirs)
    optimizer.step()
    peer.step()
    mine, other = optimizer.state_dict(), peer.state_dict()
    assert mine["param_groups"][0].keys() >= other["param_groups"][0].keys()
    for index, state in other["state"].items():
        assert {k: v.shape for k, v in mine["state"][index].items()} == {k: v.shape for k, v in state.items()}
        for key, value in state.items():
            # Five roundings of positive sums, and torch's own norm in float32.
            assert torch.allclose(mine["state"][index][key], value, rtol=1e-5)
    torch.optim.Adafactor(theirs).load_state_dict(copy.deepcopy(mine))


def test_a_skipped_step_changes_nothing_and_zero_grad_is_part_of_a_step() -> None:
    ours, theirs = twins()
    optimizer = Adafactor(ours)
    set_gradients(0, ours)
    optimizer.step_scaled(skip=torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    optimizer.step_scaled(zero_grad=True)
    assert not any(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in ours)


def test_what_it_does_not_have_is_refused() -> None:
    narrow = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"w is bfloat16.*autocast"):
        Adafactor([("w", narrow)])
    wide = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = Adafactor([wide])
    for options in ({"moments": "int8"}, {"ema": 0.9}, {"d": 0.5}, {"beta2_decay": 0.1}):
        with pytest.raises(ConfigError):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], **options})
    wide.grad = torch.ones(3, 3)
    optimizer.state[wide]["step"] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match="row_var is missing"):
        optimizer.step()
