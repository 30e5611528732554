"""The norm pass: its order is fixed to the bit, inf and nan propagate, clipping is torch's."""

from __future__ import annotations

import math

import pytest
import torch

from mlsys_engine.optim import SGD, AdamW, clip_scale, norms, reference, sum_of_squares
from tests.optim.variants import EPSILON

LENGTHS = (0, 1, 31, 32, 33, 4095, 4096, 4097, 10_001)
NARROW = (torch.bfloat16, torch.float16)
NARROW_BOUND = 2.0**-19  # csrc/optim/sum_of_squares.cpp


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("length", [*LENGTHS, 63, 64, 65, 2047, 2049])
def test_order_of_summation_is_the_reference_to_the_bit(length: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    assert sum_of_squares([tensor]).item() == reference.sum_of_squares([tensor])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_many_tensors_add_up_in_order_and_empty_ones_do_not_matter(dtype: torch.dtype) -> None:
    tensors = [torch.randn(length).to(dtype) for length in LENGTHS]
    assert sum_of_squares(tensors).item() == reference.sum_of_squares(tensors)
    total = sum_of_squares([])
    assert total.item() == 0.0
    assert total.dtype == torch.float64
    assert total.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_terms_by_chunk_add_up_to_the_sum_to_the_bit_whoever_has_made_them(dtype: torch.dtype) -> None:
    tensors = [torch.randn(length).to(dtype) for length in LENGTHS]
    spans = torch.tensor([[tensor.data_ptr(), tensor.numel()] for tensor in tensors])
    terms = torch.empty(sum(-(-length // 4096) for length in LENGTHS), dtype=torch.float64)
    half = len(LENGTHS) // 2
    first = sum(-(-length // 4096) for length in LENGTHS[:half])
    norms.squares_of_chunks(spans[half:], terms[first:], dtype)
    norms.squares_of_chunks(spans[:half], terms[:first], dtype)
    assert norms.sum_of_terms(terms).item() == sum_of_squares(tensors).item()
    assert norms.sum_of_terms(terms[:0]).item() == 0.0


def test_unaligned_strided_and_column_major_tensors_are_summed_whole() -> None:
    base = torch.randn(10_000)
    for view in (base[1:5000], base[::3], base[:6000].view(60, 100).t()):
        total = sum_of_squares([view]).item()
        exact = view.double().square().sum().item()
        # Positive terms: each of at most numel double additions rounds by 2^-53 relative, on either side.
        assert abs(total - exact) <= 2 * view.numel() * 2.0**-53 * exact


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_sums_are_within_their_bound_of_the_exact_one(dtype: torch.dtype) -> None:
    # Equal elements of full precision: every lane rounds the same way, so errors do not cancel.
    for value in (1.0078125, 0.0076, 1.3333, 3e-5):
        tensor = torch.full((20_000,), value, dtype=dtype)
        exact = tensor.double().square().sum().item()
        assert abs(sum_of_squares([tensor]).item() - exact) <= NARROW_BOUND * exact


@pytest.mark.parametrize("size", [1e25, 3e38, 1e-12, 1e-14, 1e-19, 1e-25, 1e-38, 1e-40])
def test_bf16_squares_that_float32_cannot_hold_are_counted(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.rand(10_001, generator=generator) * size).bfloat16()
    for gradients in ([tensor], [tensor, torch.cat([tensor, torch.ones(9, dtype=torch.bfloat16)])]):
        exact = torch.cat(gradients).double().square().sum().item()
        assert exact > 0.0
        assert abs(sum_of_squares(gradients).item() - exact) <= NARROW_BOUND * exact
    assert sum_of_squares([tensor]).item() == reference.sum_of_squares([tensor])


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("position", [0, 5, 31, 32, 4095, 4096, 9999])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_inf_and_nan_propagate_from_any_position(position: int, bad: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(10_000, dtype=dtype)
    tensor[position] = bad
    total = sum_of_squares([torch.ones(3, dtype=dtype), tensor]).item()
    assert math.isnan(total) if math.isnan(bad) else total == math.inf


def test_largest_floats_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    # 1024 equal squares of 48 significant bits: every partial sum is exact.
    assert sum_of_squares([torch.full((1024,), largest)]).item() == 1024 * largest**2


def test_optimizer_sums_the_present_gradients_only() -> None:
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5)]
    optimizer = AdamW(params)
    assert optimizer.sum_of_squares().item() == 0.0
    params[0].grad, params[2].grad = torch.full((3,), 2.0), torch.full((5,), 3.0)
    assert optimizer.sum_of_squares().item() == 3 * 4.0 + 5 * 9.0


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipped_step_is_torchs_clip_and_step(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((13,), (40, 7), (1,))]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(v.shape)) for v in values] for _ in range(2))
    for a, b, value in zip(ours, theirs, values, strict=True):
        a.grad, b.grad = value.clone(), value.clone()
    optimizer = SGD(ours, lr=1.0)
    optimizer.step_scaled(grad_scale=clip_scale(optimizer.sum_of_squares(), max_norm))
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.optim.SGD(theirs, lr=1.0).step()
    # torch sums n squares in float32, which the root halves, and rounds the norms, their norm, the sum with
    # 1e-6, the quotient and the product; ours rounds the scale and the product.
    num = sum(value.numel() for value in values)
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() <= EPSILON * (num / 2 + 8) * b.abs()).all()


def test_clip_scale_is_nan_for_a_nan_norm_and_zero_for_an_infinite_one() -> None:
    assert math.isnan(clip_scale(torch.tensor(math.nan, dtype=torch.float64), 1.0))
    assert clip_scale(torch.tensor(math.inf, dtype=torch.float64), 1.0) == 0.0


def test_sparse_and_half_precision_tensors_are_summed_by_torch() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), torch.tensor([1.0, 2.0, 4.0]), (5,))
    half = torch.full((3,), 2.0, dtype=torch.bfloat16)
    # Small integers: exact. The two entries at index 1 add up to 3 first.
    assert sum_of_squares([sparse, half, torch.ones(2)]).item() == pytest.approx(
        9 + 16 + 12 + 2, rel=2.0**-50
    )
