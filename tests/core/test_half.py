"""csrc/core/half.h and convert.h against torch's own conversions."""

from __future__ import annotations

import pytest
import torch

from mlsys_engine.optim.kernels import operators

HALVES = [torch.float16, torch.bfloat16]


def every_half(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal bit patterns, except that any nan equals any nan."""
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    integer = torch.int16 if ours.dtype.itemsize == 2 else torch.int32
    assert torch.equal(ours.view(integer)[~nan], theirs.view(integer)[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_value_converts_to_float_as_in_torch_and_back_to_itself(dtype: torch.dtype) -> None:
    halves = every_half(dtype)
    floats = operators().cast(halves, torch.float32)
    assert_same_bits(floats, halves.float())
    assert_same_bits(operators().cast(floats, dtype), halves)


@pytest.mark.parametrize("dtype", HALVES)
def test_floats_around_every_rounding_boundary_convert_as_in_torch(dtype: torch.dtype) -> None:
    # Every boundary between two neighbouring 16-bit values is a float: test it and its nearest neighbours.
    finite = every_half(dtype)[: 2**15]
    finite = finite[finite.isfinite()].double().sort().values
    middles = ((finite[1:] + finite[:-1]) / 2).float()
    bits = middles.view(torch.int32)
    for shift in (-1, 0, 1):
        floats = (bits + shift).view(torch.float32)
        for signed in (floats, -floats):
            assert_same_bits(operators().cast(signed, dtype), signed.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_overflow_subnormals_inf_and_nan_convert_as_in_torch(dtype: torch.dtype) -> None:
    tiny, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    values = [
        0.0,
        -0.0,
        65503.9,
        65504.0,
        65519.99,
        65520.0,
        1e6,
        largest,
        tiny,
        tiny / 4,
        2.0**-24,
        2.0**-25,
        2.0**-25 * 1.0001,
        2.0**-14,
        torch.inf,
        torch.nan,
    ]
    floats = torch.tensor(values + [-value for value in values])
    assert_same_bits(operators().cast(floats, dtype), floats.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_random_bit_patterns_of_odd_count_convert_as_in_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_003,), generator=generator).to(torch.int32)
    floats = bits.view(torch.float32)
    assert_same_bits(operators().cast(floats, dtype), floats.to(dtype))


@pytest.mark.parametrize("shape", [(0,), (), (1,), (3, 5)])
def test_shapes_are_kept(shape: tuple[int, ...]) -> None:
    assert operators().cast(torch.ones(shape), torch.bfloat16).shape == shape
