"""Options of a block that is not run again: packed, moved away, or as bits; alone, or in a block that is."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine import activation
from mlsys_engine.activation.options import OPTIONS
from mlsys_engine.memory import SavedActivationMeter
from tests.activation.test_selective import MODELS, WIDTH, One, assert_same_bits, between, gpt, step

LOSSLESS = [name for name, option in OPTIONS.items() if not option.is_lossy]
LOSSY = [name for name, option in OPTIONS.items() if option.is_lossy]
RERUN = "recompute linked after K blocks.0 with {}"


def pair(make: Any, actions: dict[str, str]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = make().train()
    return plain, activation.apply_actions(copy.deepcopy(plain), actions)


def blocks_of(make: Any, action: str) -> dict[str, str]:
    return dict.fromkeys(activation.resolve(make(), "full"), action)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("option", ["offload", "selective-offload"])
def test_offloaded_models_have_the_plain_models_bits(name: str, option: str) -> None:
    plain, other = pair(MODELS[name], blocks_of(MODELS[name], option))
    for number in range(2):
        with SavedActivationMeter(other) as meter:
            assert_same_bits(step(plain, number), step(other, number))
        assert meter.current_bytes == 0


@pytest.mark.parametrize("option", LOSSLESS)
def test_blocks_that_are_run_again_under_a_lossless_option_have_the_plain_models_bits(option: str) -> None:
    actions = {
        "blocks.0": f"recompute with {option}",
        "blocks.1": RERUN.format(option),
        "blocks.2": f"recompute with {option}",
    }
    plain, other = pair(gpt, actions)
    for number in range(2):
        with SavedActivationMeter(other) as meter:
            assert_same_bits(step(plain, number), step(other, number))
        assert meter.current_bytes == 0


def test_a_block_whose_input_is_the_output_of_a_cheap_operation_is_run_again_under_selective() -> None:
    first, second = activation.resolve(MODELS["bert"](), "full")  # their outputs are LayerNorm's
    actions = {first: "recompute", second: f"recompute linked after K {first} with selective"}
    plain, other = pair(MODELS["bert"], actions)
    for number in range(2):
        assert_same_bits(step(plain, number), step(other, number))


@pytest.mark.parametrize("action", [*LOSSY, *(f"recompute with {option}" for option in LOSSY)])
def test_lossy_gradients_are_near_the_plain_ones_and_nothing_stays(action: str) -> None:
    plain, other = pair(lambda: gpt(dropout=0.0), blocks_of(gpt, action))
    expected, found = step(plain, 0), None
    with SavedActivationMeter(other) as meter:
        found = step(other, 0)
    assert torch.equal(found["loss"], expected["loss"])  # the forward is the plain one
    assert meter.current_bytes == 0
    gc.collect()
    assert not other.blocks[0].forward._saving.context.recipes
    gradients = [key for key, _ in plain.named_parameters()]
    difference = sum((found[key] - expected[key]).square().sum() for key in gradients)
    size = sum(expected[key].square().sum() for key in gradients)
    # fp8, the coarsest, has 3 bits after the leading one: rounding by chance moves a value by less than 2^-3
    # of itself, and a product of two by twice that. The errors of a gradient's many terms cancel in part.
    assert 0 < difference.sqrt() < 2 * 2**-3 * size.sqrt()


def test_the_weight_gradient_of_an_int8_layer_is_within_the_derived_bound() -> None:
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    plain, other = pair(lambda: One(nn.Sequential(copy.deepcopy(layer))), {"blocks.0": "int8"})
    before = nn.Linear(WIDTH, WIDTH)
    x, weights = torch.randn(64, WIDTH), torch.randn(64, WIDTH)
    found = []
    for model in (plain, other):
        hidden = before(x)
        (model(hidden) * weights).sum().backward()
        found.append(next(model.parameters()).grad.double())
    hidden = before(x).detach()
    # Rounding moves an element by less than one of the 127 levels up to the largest of its 64 neighbours.
    level = hidden.reshape(-1, 64).abs().amax(1, keepdim=True).double() / 127
    bound = weights.double().abs().T @ level.expand(-1, 64).reshape(64, WIDTH)
    assert (found[0] - found[1]).abs().max() > 0
    assert ((found[0] - found[1]).abs() <= bound * (1 + 2**-20)).all()


def test_int8_saves_a_third_of_the_bytes_or_less() -> None:
    plain, other = pair(lambda: One(gpt(dropout=0.0).blocks[0]), {"blocks.0": "int8"})
    x = torch.randn(4, 32, WIDTH)
    assert between(other, x) * 3 <= between(plain, x)


class Dropout(nn.Module):
    """Its masks are floats on the CPU; the other one is boolean, and made in the block."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.3)
        return x.masked_fill(x.detach() > 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masks_are_kept_as_bits_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    plain, other = pair(lambda: One(Dropout()), {"blocks.0": "selective"})
    x = torch.randn(64, 1024, dtype=dtype, requires_grad=True)
    saved, gradients = [], []
    for model in (plain, other):
        torch.manual_seed(3)
        saved.append(between(model, x))
        gradients.append(x.grad)
        x.grad = None
    assert saved == [x.numel() * (dtype.itemsize + 1), 2 * x.numel() // 8]
    assert torch.equal(*gradients)


class Rows(nn.Module):
    """Saves statistics of rows, a buffer, an input without gradient, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("table", torch.randn(2048, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.norm(x) * self.table * y).exp()


def test_statistics_buffers_and_inputs_of_the_block_are_not_packed() -> None:
    torch.manual_seed(0)
    block, x, y = Rows(), torch.randn(2048, WIDTH, requires_grad=True), torch.randn(2048, WIDTH)
    expected = block(x, y).grad_fn
    activation.apply_actions(nn.ModuleDict({"0": block}), {"0": "int8"})
    node = block(x, y).grad_fn
    assert not torch.equal(node._saved_result, expected._saved_result)  # an activation
    product = node.next_functions[0][0]
    assert torch.equal(product._saved_other, y)
    product = product.next_functions[0][0]
    assert torch.equal(product._saved_other, block.table)
    norm, plain = product.next_functions[0][0], expected.next_functions[0][0].next_functions[0][0]
    assert torch.equal(norm._saved_result2, plain.next_functions[0][0]._saved_result2)
