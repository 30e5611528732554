"""Narrow parameters and moments: lossless where promised, unbiased and repeatable where chance rounds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mlsys_engine.errors import ConfigError
from mlsys_engine.models import GPT, GPTConfig
from mlsys_engine.optim import OPTIMIZERS, NativeOptimizer, averaged_weights
from mlsys_engine.optim.formats import Stored
from mlsys_engine.optim.storage import decoded, encoded, joined, remainder_of, to_bfloat16_away
from tests.optim.variants import VARIANTS, WITH_FORMS, gradients_for, make

SHAPE = (37, 129)  # no multiple of a vector, a code block or a block of the cache
SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 3.0e38, -3.4e38, 1e-45, -1.1754942e-38, float("inf"), -float("inf"), float("nan")]
)


def train(
    parameter: Tensor, name: str, options: dict[str, Any], steps: int, seed: int = 0
) -> NativeOptimizer:
    """Steps the one parameter; gradients are the same bf16 values in any dtype of parameter."""
    optimizer = make(name, [("weight", parameter)], options)
    go_on(optimizer, parameter, steps, seed)
    return optimizer


def go_on(optimizer: NativeOptimizer, parameter: Tensor, steps: int, seed: int) -> None:
    for gradient in gradients_for(tuple(parameter.shape), steps, seed):
        parameter.grad = gradient.bfloat16().to(parameter.dtype)
        optimizer.step()


def start(dtype: torch.dtype, seed: int = 0) -> torch.nn.Parameter:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(values.bfloat16().to(dtype))


def floats_of_every_kind() -> Tensor:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0))
    return torch.cat([bits.to(torch.int32).view(torch.float32), SPECIAL])


# ---- the two halves of a float


def test_a_float_is_the_sum_of_its_two_halves_for_every_kind_of_float() -> None:
    values = floats_of_every_kind()
    back = joined(to_bfloat16_away(values), remainder_of(values))
    same = back.view(torch.int32) == values.view(torch.int32)
    assert (same | (values.isnan() & back.isnan())).all()


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", WITH_FORMS)
def test_a_split_master_an_fp32_master_and_an_fp32_parameter_have_one_trajectory(
    name: str, moments: str
) -> None:
    for variant in VARIANTS[name]:
        whole, split, copied = start(torch.float32), start(torch.bfloat16), start(torch.bfloat16)
        options = {**variant, "moments": moments}
        train(whole, name, options, steps=12)
        halves = train(split, name, {**options, "master": "split"}, steps=12)
        copied_by = train(copied, name, {**options, "master": "fp32"}, steps=12)
        assert torch.equal(split, copied)
        assert torch.equal(halves.state_dict()["state"][0]["master"], whole)
        assert torch.equal(copied_by.state_dict()["state"][0]["master"], whole)
        assert torch.equal(split, to_bfloat16_away(whole.detach()))


@pytest.mark.slow  # ten seconds
def test_masters_of_both_kinds_train_a_transformer_to_the_same_bits_for_a_thousand_steps() -> None:
    def trained(master: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = GPT(GPTConfig(context_length=16, num_heads=1, width=16)).bfloat16()
        optimizer = make("adamw", model.named_parameters(), {"lr": 1e-2, "master": master})
        generator = torch.Generator().manual_seed(1)
        for _ in range(1000):
            windows = torch.randint(64, (2, 16), generator=generator)
            model(windows, labels=windows).loss.backward()
            optimizer.step_scaled(zero_grad=True)
        return [parameter.detach().clone() for parameter in model.parameters()]

    split, whole = trained("split"), trained("fp32")
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(split, whole, strict=True))


# ---- eight-bit codes


@pytest.mark.parametrize("stored", [Stored.SIGNED8, Stored.UNSIGNED8])
def test_every_code_under_every_scale_is_a_value_that_keeps_its_bits(stored: Stored) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(253)
    scales = torch.arange(1, 254, dtype=torch.uint8).repeat_interleave(4)
    values = decoded(codes, scales, stored)
    again = decoded(*encoded(values, stored), stored)
    # Far below a block's largest value lies nothing: the next smaller scale would underflow there.
    tiny = values.abs() < 2.0**-100
    assert torch.equal(again[~tiny], values[~tiny])
    assert torch.isfinite(values).all()


def test_codes_hold_large_and_small_neighbours_to_their_own_precision() -> None:
    values = torch.logspace(0, -9, 64, dtype=torch.float64).float()
    unsigned = decoded(*encoded(values, Stored.UNSIGNED8), Stored.UNSIGNED8)
    assert ((unsigned - values).abs() <= values / 16).all()  # three bits of fraction, to nearest
    signed = decoded(*encoded(-values, Stored.SIGNED8), Stored.SIGNED8)
    # Below 2^-14 of the scale, which is at most 2, steps are 2^-17 of it.
    assert ((signed + values).abs() <= (values / 16).clamp(min=2.0**-17)).all()


def test_a_zero_stays_zero_and_a_positive_sum_of_squares_never_becomes_zero() -> None:
    values = torch.tensor([1.0, 0.0, 1e-30, 1e-12])
    back = decoded(*encoded(values, Stored.UNSIGNED8), Stored.UNSIGNED8)
    assert back[1] == 0.0
    assert (back[[0, 2, 3]] > 0).all()


# ---- rounding by chance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_master_new_values_are_neighbours_drawn_without_bias(dtype: torch.dtype) -> None:
    """Bound: a draw errs by less than one spacing d; the mean of n by 6 d / (2 sqrt(n)) but once in 1e9."""
    count, exact = 200_000, 1.0 + 1.0 / 700.0
    parameter = torch.nn.Parameter(torch.ones(count, dtype=dtype))
    optimizer = make("sgd", [parameter], {"lr": 1.0, "master": None})
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((count,), -1.0 / 700.0)
    optimizer.step()
    spacing = torch.finfo(dtype).eps
    low = 1.0 + int((exact - 1.0) / spacing) * spacing
    assert set(parameter.detach().double().unique().tolist()) == {low, low + spacing}
    mean = parameter.detach().double().mean().item()
    assert abs(mean - exact) < 6 * spacing / (2 * count**0.5)


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_a_second_moment_moves_by_less_than_its_spacing(moments: str) -> None:
    """To nearest it would stay where it is for ever; v = 1 - 0.999^n, and chance adds at most 6 sigma.

    Each step adds an error of at most one spacing d of the form; over n steps and N elements the mean's
    standard deviation is below d sqrt(n) / (2 sqrt(N)).
    """
    count, steps = 64 * 500, 300
    parameter = torch.nn.Parameter(torch.zeros(count))
    optimizer = make("adamw", [parameter], {"lr": 0.0, "moments": moments})
    for _ in range(steps):
        parameter.grad = torch.ones(count)
        optimizer.step()
    second = optimizer.state_dict()["state"][0]["exp_avg_sq"].double().mean().item()
    expected = 1 - 0.999**steps
    spacing = {"bf16": 2.0**-8, "int8": 2.0**-3}[moments] * 0.5
    assert abs(second - expected) < 6 * spacing * steps**0.5 / (2 * count**0.5)


@pytest.mark.parametrize(
    "options", [{"moments": "int8"}, {"moments": "bf16", "master": None}, {"master": None}]
)
def test_chance_depends_on_seed_name_and_step_and_on_nothing_else(options: dict[str, Any]) -> None:
    first, second, other_seed, other_name = (start(torch.bfloat16) for _ in range(4))
    train(first, "adamw", options, steps=5)
    beside = torch.nn.Parameter(torch.randn(5000))
    beside.grad = torch.ones(5000)
    optimizer = make("adamw", [("beside", beside), ("weight", second)], options)
    go_on(optimizer, second, 5, seed=0)
    assert torch.equal(first, second)
    train(other_seed, "adamw", {**options, "seed": 1}, steps=5)
    assert not torch.equal(first, other_seed)
    go_on(make("adamw", [("other", other_name)], options), other_name, 5, seed=0)
    assert not torch.equal(first, other_name)


# ---- what else happens in the pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_follows_the_weights_and_stands_in_for_them_when_asked(dtype: torch.dtype) -> None:
    parameter = start(dtype)
    optimizer = make("adamw", [parameter], {"lr": 0.1, "ema": 0.9})
    expected = parameter.detach().double()
    for gradient in gradients_for(SHAPE, 6, seed=3):
        parameter.grad = gradient.to(dtype)
        optimizer.step()
        whole = optimizer.state_dict()["state"][0].get("master", parameter).detach().double()
        expected = expected + (1 - 0.9) * (whole - expected)
    ema = optimizer.state_dict()["state"][0]["ema"]
    # Each step rounds three times, relative to at most max|w|, and errors shrink by 0.9: 10 times one step's.
    assert (ema - expected).abs().max() <= 10 * 3 * 2.0**-24 * expected.abs().max()
    own = parameter.detach().clone()
    with averaged_weights(optimizer):
        assert torch.equal(parameter, ema.to(dtype))
    assert torch.equal(parameter, own)


def test_asking_for_averages_that_nobody_keeps_is_refused() -> None:
    theirs: Any = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    for optimizer in (make("sgd", [torch.nn.Parameter(torch.ones(2))], {"lr": 0.1}), theirs):
        with pytest.raises(ConfigError, match="keeps no average"), averaged_weights(optimizer):
            pass


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_zeroed_in_the_same_pass_and_a_skipped_step_leaves_them(
    name: str, gradient_dtype: torch.dtype
) -> None:
    kept, zeroed = start(torch.float32), start(torch.float32)
    optimizers = [make(name, [parameter], VARIANTS[name][0]) for parameter in (kept, zeroed)]
    for parameter in (kept, zeroed):
        parameter.grad_dtype = gradient_dtype
        parameter.grad = gradients_for(SHAPE, 1, seed=1)[0].to(gradient_dtype)
    optimizers[1].step_scaled(zero_grad=True, skip=True)
    assert zeroed.grad is not None
    assert torch.equal(zeroed.grad, kept.grad)
    optimizers[0].step_scaled()
    optimizers[1].step_scaled(zero_grad=True)
    assert torch.equal(kept, zeroed)
    assert torch.equal(zeroed.grad, torch.zeros_like(zeroed))


def test_a_parameter_written_by_somebody_else_wins_over_its_master() -> None:
    for master in ("split", "fp32"):
        parameter = start(torch.bfloat16)
        optimizer = train(parameter, "sgd", {"lr": 0.01, "master": master}, steps=3)
        with torch.no_grad():
            parameter.fill_(0.5)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(parameter, torch.full_like(parameter, 0.5)), master


def test_a_split_master_of_float16_is_refused() -> None:
    parameter = start(torch.float16)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ConfigError, match="float16"):
        make("adamw", [parameter], {"master": "split"}).step()


@pytest.mark.parametrize("moments", ["bf16", "int8"])
@pytest.mark.parametrize("name", WITH_FORMS)
def test_state_restored_in_the_middle_goes_on_with_the_same_bits(name: str, moments: str) -> None:
    options = {**VARIANTS[name][-1], "moments": moments, "ema": 0.99}
    parameter = start(torch.bfloat16)
    optimizer = train(parameter, name, options, steps=5)
    twin = torch.nn.Parameter(parameter.detach().clone())
    again = make(name, [("weight", twin)], options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go_on(optimizer, parameter, 5, seed=9)
    go_on(again, twin, 5, seed=9)
    assert torch.equal(parameter, twin)
    first, second = optimizer.state_dict()["state"][0], again.state_dict()["state"][0]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_eight_bit_moments_with_a_split_master_store_eight_bytes_a_parameter_and_a_little() -> None:
    parameter = torch.nn.Parameter(torch.zeros(64 * 1000, dtype=torch.bfloat16))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make("adamw", [parameter], {"moments": "int8"})
    optimizer.step()
    tensors = [parameter, parameter.grad, *optimizer.state[parameter].values()]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)
    assert stored / parameter.numel() <= 8.1
