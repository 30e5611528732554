"""A thousand steps, some of which end in an error, leave nothing behind and the model healthy."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine import activation
from mlsys_engine.memory import SavedActivationMeter

WIDTH = 32
LINKED = {"blocks.0": "recompute", "blocks.1": "recompute linked after C blocks.0"}
POLICIES = {
    "full": {"blocks.0": "recompute", "blocks.1": "recompute"},
    "nested": {"": "recompute", "blocks.0": "recompute", "blocks.1": "recompute"},
    "budget": LINKED,
    "selective": {"blocks.0": "selective", "blocks.1": "selective"},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fails = ""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.up(x))
        in_backward = torch._C._current_graph_task_id() != -1
        if self.fails == ("second run" if in_backward else "first run"):
            raise ZeroDivisionError
        return x + self.down(y)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def fail(_: Tensor) -> None:
    raise ZeroDivisionError


def failing_step(model: Two, x: Tensor, number: int) -> None:
    """An error in the first run, in the second one, or in the backward between them."""
    block, kind = model.blocks[number % 2], ("first run", "second run", "backward")[number % 3]
    block.fails = kind
    try:
        y = model(x)
        if kind == "backward":
            y.register_hook(fail)
        y.square().sum().backward()
    except ZeroDivisionError:
        pass
    finally:
        block.fails = ""


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_steps_with_errors_hold_as_much_as_ten_and_have_the_plain_gradients(policy: str) -> None:
    torch.manual_seed(0)
    model, x = Two(), torch.randn(64, WIDTH)  # 8 KiB: selective drops tensors of this size
    expected = gradients(model, x)
    activation.apply_actions(model, POLICIES[policy])

    def steps(numbers: range) -> None:
        for number in numbers:
            if number % 7 == 3:
                failing_step(model, x, number)
            else:
                model(x).square().sum().backward()

    steps(range(60))
    model.zero_grad()
    gc.collect()
    before = sys.getallocatedblocks()
    steps(range(60, 1000))
    model.zero_grad()
    gc.collect()  # an error's traceback is a cycle
    # One object left by each step would be 940.
    assert sys.getallocatedblocks() - before < 200
    with SavedActivationMeter(model) as meter:
        found = gradients(model, x)
    assert meter.current_bytes == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
