"""The meter of saved activations counts storages once and forgets them when autograd does."""

from __future__ import annotations

import torch
from torch import nn

from mlsys_engine.memory import SavedActivationMeter


def test_nothing_saved_is_zero_bytes() -> None:
    with SavedActivationMeter() as meter:
        torch.ones(10).exp()
    assert (meter.current_bytes, meter.peak_bytes) == (0, 0)


def test_a_storage_saved_twice_counts_once() -> None:
    x = torch.ones(10, requires_grad=True) + 0
    with SavedActivationMeter() as meter:
        y = (x * x).sum() + x.view(2, 5).square().sum()
        assert meter.current_bytes == x.nbytes
        y.backward()
    assert meter.current_bytes == 0


def test_parameters_their_views_and_given_buffers_do_not_count() -> None:
    layer = nn.Linear(8, 8)
    layer.register_buffer("mask", torch.ones(8))
    x = torch.ones(4, 8)
    with SavedActivationMeter(layer) as meter:
        (layer(x) * layer.mask).sum().backward()
    # Only the input is kept: the weight's gradient needs it.
    assert meter.peak_bytes == x.nbytes


def test_peak_stays_after_the_backward_and_a_dropped_graph_is_forgotten() -> None:
    with SavedActivationMeter() as meter:
        y = (torch.ones(100, requires_grad=True) * 2).exp()
        assert meter.current_bytes == 400
        del y
        assert meter.current_bytes == 0
    assert meter.peak_bytes == 400


def test_meters_nest_and_each_sees_its_own_span() -> None:
    x = torch.ones(10, requires_grad=True)
    with SavedActivationMeter() as outer:
        a = (x * 2).exp()
        with SavedActivationMeter() as inner:
            b = a.exp()
        assert inner.peak_bytes == 40
        assert outer.current_bytes == 80
        del a, b
    assert outer.current_bytes == 0


def test_measuring_changes_no_derivative() -> None:
    x = torch.linspace(0, 1, 7, dtype=torch.float64, requires_grad=True)

    def second_derivative() -> torch.Tensor:
        (first,) = torch.autograd.grad(x.exp().square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    plain = second_derivative()
    with SavedActivationMeter():
        assert torch.equal(second_derivative(), plain)
