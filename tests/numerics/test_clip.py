from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.numerics import gradient_scale


def _scalars(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


@given(st.floats(0, 1e6), st.integers(1, 10**6), st.floats(1e-3, 1e3))
def test_scale_is_that_of_clip_grad_norm(norm, count, max_norm):
    gradient = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    gradient.grad = torch.tensor([norm / count], dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([gradient], max_norm)
    scale = gradient_scale(*_scalars(norm * norm, float(count)), max_norm)
    # A square, a root and two divisions in float64: a few units in the last place.
    assert scale.scale.item() * norm == pytest.approx(gradient.grad.item(), rel=1e-14, abs=1e-150)
    assert not scale.skip


def test_without_clipping_the_scale_is_one_over_the_count():
    scale = gradient_scale(*_scalars(16.0, 8.0), None)
    assert (scale.norm.item(), scale.scale.item(), scale.skip.item()) == (0.5, 0.125, False)


@pytest.mark.parametrize(
    ("sum_of_squares", "count"), [(float("inf"), 4.0), (float("nan"), 4.0), (0.0, 0.0), (1.0, 0.0)]
)
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_what_is_not_finite_or_counted_is_skipped(sum_of_squares, count, max_norm):
    assert gradient_scale(*_scalars(sum_of_squares, count), max_norm).skip


def test_a_gradient_of_zero_is_stepped():
    scale = gradient_scale(*_scalars(0.0, 2.0), 1.0)
    assert not scale.skip and scale.scale.item() == 0.5
