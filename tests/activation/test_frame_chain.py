"""Blocks that are recomputed together: what a chain's schedule says is what happens, and the bits stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine.activation.recompute import Place, Region, run_recomputed
from mlsys_engine.memory import SavedActivationMeter
from mlsys_engine.native import load_activation

WIDTH = 16
Steps = list[tuple[int, str]]


class Block(nn.Module):
    """Draws random numbers, and takes a second tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.inner(x) + bias


class Chained(nn.Module):
    """Runs its blocks, each in the frame of its place; `between` is the parent's own code between two."""

    def __init__(self, num_blocks: int, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.between = between
        self.chain: object = None
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        bias = x * 0.5
        for position, block in enumerate(self.blocks):
            if self.chain is None:
                x = block(x, bias)
            else:
                x = run_recomputed(self._region(position), (x, bias), {})
            x = self.between(x)
        return x.square().sum()

    def _region(self, position: int) -> Region:
        def run(x: Tensor, bias: Tensor) -> Tensor:
            self.runs.append(position)
            return self.blocks[position](x, bias)

        return Region(f"blocks.{position}", run, Place(self.chain, position))


# Of four blocks: those that keep no input of their own, and what is run before each backward.
ONE_SEGMENT = ([False, True, True, True], [[(0, "saved")], [(1, "saved")], [(2, "saved")],
               [(0, "saved"), (1, "saved"), (2, "saved"), (3, "saved")]])  # fmt: skip
TWO_SEGMENTS = ([False, True, False, True], [[(0, "saved")], [(0, "inputs"), (1, "saved")], [(2, "saved")],
                [(2, "saved"), (3, "saved")]])  # fmt: skip
QUADRATIC = ([False, True, True, True], [[(0, "saved")], [(0, "nothing"), (1, "saved")],
             [(0, "nothing"), (1, "nothing"), (2, "saved")],
             [(0, "nothing"), (1, "nothing"), (2, "nothing"), (3, "saved")]])  # fmt: skip
NESTED = ([False, True, True, True], [[(0, "saved")], [(1, "saved")],
          [(0, "saved"), (1, "inputs"), (2, "saved")],
          [(0, "nothing"), (1, "nothing"), (2, "nothing"), (3, "saved")]])  # fmt: skip


def gradients(model: Chained, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    model(x).backward()
    return {"x": x.grad.clone(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("schedule", [ONE_SEGMENT, TWO_SEGMENTS, QUADRATIC, NESTED])
@pytest.mark.parametrize("between", [lambda x: x, lambda x: x + 1], ids=["linked", "computing in between"])
def test_gradients_and_random_state_are_the_plain_models(
    schedule: tuple[list[bool], list[Steps]], between: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    plain = Chained(4, between)
    chained = copy.deepcopy(plain)
    chained.chain = load_activation().FrameChain(*schedule)
    x = torch.randn(8, WIDTH, requires_grad=True)
    for _ in range(2):
        expected = gradients(plain, x)
        state = torch.get_rng_state()
        found = gradients(chained, x)
        assert torch.equal(state, torch.get_rng_state())
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("schedule", "runs"),
    [
        (ONE_SEGMENT, [0, 1, 2, 3]),
        (TWO_SEGMENTS, [2, 3, 0, 1, 0]),
        (QUADRATIC, [0, 1, 2, 3, 0, 1, 2, 0, 1, 0]),
        (NESTED, [0, 1, 2, 3, 0, 1, 2, 1]),
    ],
)
def test_the_blocks_are_run_again_as_the_schedule_says(
    schedule: tuple[list[bool], list[Steps]], runs: list[int]
) -> None:
    model = Chained(4)
    model.chain = load_activation().FrameChain(*schedule)
    gradients(model, torch.randn(8, WIDTH, requires_grad=True))
    assert model.runs == [0, 1, 2, 3, *runs]


def test_what_stays_between_forward_and_backward_is_the_first_input_of_each_segment() -> None:
    num_bytes = 64 * WIDTH * 4
    for schedule, num_inputs in ((ONE_SEGMENT, 1), (TWO_SEGMENTS, 2)):
        model = Chained(4)
        model.chain = load_activation().FrameChain(*schedule)
        x = torch.randn(64, WIDTH, requires_grad=True) * 1.0
        with SavedActivationMeter(model) as meter:
            loss = model(x)
            # The inputs, the bias that all blocks share, and what the square keeps.
            assert meter.current_bytes == (num_inputs + 2) * num_bytes
            loss.backward()
        assert meter.current_bytes == 0


def test_a_second_backward_through_the_same_graph_finds_its_inputs_again() -> None:
    torch.manual_seed(0)
    model = Chained(4)
    model.chain = load_activation().FrameChain(*NESTED)
    x = torch.randn(8, WIDTH, requires_grad=True)
    loss = model(x)
    first = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *model.parameters()])
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_an_error_in_a_recomputation_leaves_the_next_step_healthy() -> None:
    torch.manual_seed(0)
    model = Chained(4)
    x = torch.randn(8, WIDTH, requires_grad=True)
    expected = gradients(model, x)
    model.chain = load_activation().FrameChain(*ONE_SEGMENT)
    loss = model(x)
    own, model.blocks[2].forward = model.blocks[2].forward, lambda x, bias: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    model.blocks[2].forward = own
    for name, value in gradients(model, x).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("before", [[[]], [[(1, "saved")]], [[(0, "inputs")]]])
def test_a_chain_that_never_runs_a_block_is_refused(before: list[Steps]) -> None:
    with pytest.raises(ValueError, match="block 0 is never run"):
        load_activation().FrameChain([False], before)
