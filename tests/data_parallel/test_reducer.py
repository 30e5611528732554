from __future__ import annotations

import pytest
import torch
from torch import nn

from mlsys_engine.data_parallel.arenas import ModelArenas
from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.errors import ConfigError, InternalError
from tests.data_parallel.models import mlp, plan_of


class Doubling:
    """A reduction between two equal ranks: doubles in place, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, bucket):
        self.calls.append(bucket.gradients.data_ptr())
        bucket.gradients.mul_(2)
        return self

    def wait(self):
        pass


def _reducer(model, bucket_mib=1e-6, automatic=True):
    """With the default, a bucket for each parameter."""
    arenas = ModelArenas(plan_of(model, bucket_mib=bucket_mib).buckets, dict(model.named_parameters()))
    reduce = Doubling()
    return Reducer(arenas.buckets, reduce, automatic), arenas, reduce


def _settle(reducer):
    reducer.finish()
    reducer.wait()
    reducer.settle(list(reducer.used))


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _expected(model, *inputs):
    model.zero_grad()
    for x in inputs:
        model(x).sum().backward()
    return {
        name: None if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def test_all_buckets_are_launched_in_order_before_backward_ends():
    model, x = mlp(), torch.ones(3, 4)
    expected = _expected(model, x)
    reducer, arenas, reduce = _reducer(model)
    reducer.start(1)
    model(x).sum().backward()
    assert reducer.num_overlapped == reducer.num_buckets == 6
    reducer.end_backward()
    _settle(reducer)
    assert reduce.calls == [bucket.gradients.data_ptr() for bucket in arenas.buckets]
    for name, gradient in _gradients(model).items():
        assert torch.equal(gradient, 2 * expected[name])


def test_a_later_bucket_that_is_ready_first_waits_for_its_turn():
    model = mlp()
    reducer, arenas, reduce = _reducer(model)
    reducer.start(1)
    for place in arenas.places[1:]:
        place.parameter.grad = torch.ones_like(place.parameter)
        reducer.ready(place.parameter)
    assert reduce.calls == []
    first = arenas.places[0].parameter
    first.grad = torch.ones_like(first)
    reducer.ready(first)
    assert reduce.calls == [bucket.gradients.data_ptr() for bucket in arenas.buckets]


def test_only_the_last_backward_communicates():
    model, inputs = mlp(), torch.randn(3, 5, 4).unbind()
    expected = _expected(model, *inputs)
    reducer, _, reduce = _reducer(model)
    reducer.start(3)
    for index, x in enumerate(inputs):
        assert reduce.calls == []
        model(x).sum().backward()
        assert bool(reduce.calls) == (index == 2)
        reducer.end_backward()
    _settle(reducer)
    for name, gradient in _gradients(model).items():
        # The same additions in the same order.
        assert torch.equal(gradient, 2 * expected[name])


def test_stale_gradients_never_leak_into_the_next_step():
    model, x = mlp(), torch.ones(3, 4)
    reducer, *_ = _reducer(model)
    results = []
    for _ in range(2):
        reducer.start(1)
        model(x).sum().backward()
        reducer.end_backward()
        _settle(reducer)
        results.append({name: gradient.clone() for name, gradient in _gradients(model).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_by_the_user_is_survived(set_to_none):
    model, x = mlp(), torch.ones(3, 4)
    expected = _expected(model, x)
    reducer, *_ = _reducer(model)
    for _ in range(2):
        reducer.start(1)
        model(x).sum().backward()
        reducer.end_backward()
        _settle(reducer)
        assert torch.equal(model[0].weight.grad, 2 * expected["0.weight"])
        model.zero_grad(set_to_none=set_to_none)


def test_a_parameter_without_a_gradient_contributes_zeros_and_keeps_none():
    model = mlp()
    reducer, arenas, reduce = _reducer(model)
    arenas.pairs["float32"].gradients.data.fill_(7)
    reducer.start(1)
    model[0](torch.ones(1, 4)).sum().backward()
    reducer.end_backward()
    assert reducer.num_overlapped == 0  # the buckets of unused parameters come first, and wait for finish
    _settle(reducer)
    assert len(reduce.calls) == reducer.num_buckets
    assert [place.name for place in arenas.places if place.parameter.grad is not None] == [
        "0.bias",
        "0.weight",
    ]
    unused = [place for place in arenas.places if place.parameter.grad is None]
    assert all(not place.gradient.any() for place in unused)


def test_a_parameter_that_another_rank_used_gets_its_gradient_here():
    model = mlp()
    reducer, *_ = _reducer(model)
    reducer.start(0)
    reducer.finish()
    reducer.wait()
    reducer.settle([True] * 6)
    assert all(not gradient.any() for gradient in _gradients(model).values())


def test_a_gradient_after_its_bucket_was_launched_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True)
            return x

    model = Twice()
    reducer, *_ = _reducer(model)
    reducer.start(1)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        model(torch.ones(1, 2, requires_grad=True)).sum().backward()


def test_nonreentrant_checkpointing_of_a_shared_layer_is_reduced_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(2):
                x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
            return x

    model, x = Twice(), torch.ones(1, 4)
    expected = _expected(model, x)
    reducer, *_ = _reducer(model)
    reducer.start(1)
    model(x).sum().backward()
    reducer.end_backward()
    _settle(reducer)
    assert torch.equal(model.layer.weight.grad, 2 * expected["layer.weight"])


def test_backwards_outside_a_step_are_left_alone():
    model, x = mlp(), torch.ones(3, 4)
    expected = _expected(model, x)
    model.zero_grad()
    reducer, arenas, reduce = _reducer(model)
    model(x).sum().backward()
    assert reduce.calls == []
    assert torch.equal(model[0].weight.grad, expected["0.weight"])
    reducer.start(1)
    reducer.cancel()
    model.zero_grad()
    model(x).sum().backward()
    assert reduce.calls == [] and not arenas.pairs["float32"].gradients.data.any()


def test_a_schedule_launches_buckets_itself():
    model = mlp()
    reducer, _, reduce = _reducer(model, automatic=False)
    reducer.start(1)
    model(torch.ones(1, 4)).sum().backward()
    assert reduce.calls == []
    reducer.launch(0)
    assert len(reduce.calls) == 1
    with pytest.raises(InternalError, match="bucket 1 is next"):
        reducer.launch(2)
    reducer.end_backward()
    _settle(reducer)
    assert len(reduce.calls) == reducer.num_buckets


def test_backwards_are_counted():
    reducer, *_ = _reducer(mlp())
    reducer.start(1)
    with pytest.raises(InternalError, match="1 backwards to come"):
        reducer.finish()
    reducer.end_backward()
    with pytest.raises(InternalError, match="more backwards"):
        reducer.end_backward()


def test_a_sparse_gradient_is_made_dense():
    model = nn.Embedding(5, 2, sparse=True)
    reducer, *_ = _reducer(model)
    for indices in ([1, 1], [3]):
        reducer.start(2)
        for _ in range(2):
            model(torch.tensor(indices)).sum().backward()
            reducer.end_backward()
        _settle(reducer)
        expected = torch.zeros(5, 2)
        expected[indices[0]] = 4 * len(indices)
        assert torch.equal(model.weight.grad, expected)


def test_closing_removes_the_hooks():
    model = mlp()
    reducer, _, reduce = _reducer(model)
    reducer.close()
    reducer.start(1)
    model(torch.ones(1, 4)).sum().backward()
    assert reduce.calls == []
