"""Several ranks, small models: the edges of data parallelism."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from mlsys_engine import optim, strategies
from tests.data_parallel.models import mlp, pairs, squared_error

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAMW = functools.partial(optim.AdamW, lr=0.05, weight_decay=0.1)
# Sums of a few dozen fp32 products in another order: relative 1e-5 is some hundred roundings.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _wrap(model, optimizer=ADAMW, loss=squared_error, bucket_mib=1e-4, **options):
    strategy = strategies.DataParallel(bucket_mib=bucket_mib)
    return strategies.wrap(model, optimizer=optimizer, loss=loss, strategy=strategy, **options)


def _weights(model):
    # Arrays, because torch sends tensors between processes as handles that die with the sender.
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def _assert_equal_everywhere(values):
    for other in values[1:]:
        assert other.keys() == values[0].keys()
        assert all(np.array_equal(other[name], values[0][name]) for name in other)


def _one_process(model, optimizer, steps):
    """Trains on the concatenation of each step's batches with plain torch."""
    optimizer = optimizer(model.parameters())
    for batches in steps:
        optimizer.zero_grad()
        parts = [squared_error(model(batch[0]), batch) for batch in batches]
        (sum(part for part, _ in parts) / sum(count for _, count in parts)).backward()
        optimizer.step()
    return _weights(model)


def _uneven(rank, world_size):
    # Rank r has r microbatches of r + 1 samples: rank 0 has none at all, at the first step too.
    model = mlp(seed=rank)
    runner = _wrap(model)
    for step in range(4):
        result = runner.step([pairs(rank + 1, seed=100 * step + part) for part in range(rank)])
    return (
        _weights(model),
        result.loss.item(),
        result.num_tokens.item(),
        str(runner.built().plan.order_source),
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_fewer_or_no_microbatches_still_take_part(run_ranks, world_size):
    values = run_ranks(_uneven, world_size)
    _assert_equal_everywhere([weights for weights, *_ in values])
    assert len({loss for _, loss, *_ in values}) == 1
    num_samples = sum(rank * (rank + 1) for rank in range(world_size))
    assert {count for _, _, count, _ in values} == {2 * num_samples}
    steps = [
        [pairs(rank + 1, seed=100 * step + part) for rank in range(world_size) for part in range(rank)]
        for step in range(4)
    ]
    expected = _one_process(
        mlp(seed=0), functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1), steps
    )
    for name, tensor in values[0][0].items():
        np.testing.assert_allclose(tensor, expected[name], **CLOSE)
    # Rank 0 had no sample, so all ranks took its plan in registration order.
    assert {source for *_, source in values} == {"registration: no sample was given"}


class Branches(nn.Module):
    """`everywhere` is used by all, `here` only where the batch says so, `nowhere` by nobody."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.everywhere, self.here, self.nowhere = (nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        output = self.everywhere(x)
        return output + self.here(x) if x.shape[0] == 3 else output


def _branches(rank, world_size, factory):
    model = Branches()
    runner = _wrap(model, optimizer=factory)
    before = _weights(model)
    grads = []
    for step in range(3):
        # The branch is taken by rank 1 alone, in its first microbatch only.
        batches = [pairs(3 if rank == 1 else 2, seed=step), pairs(2, seed=50 + step)]
        runner.step(batches)
        grads.append({name: parameter.grad is not None for name, parameter in model.named_parameters()})
    return before, _weights(model), grads


@pytest.mark.parametrize("factory", [SGD, ADAMW, functools.partial(torch.optim.AdamW, lr=0.1)])
def test_parameters_used_on_one_rank_are_stepped_on_all_and_those_used_by_none_on_none(run_ranks, factory):
    values = run_ranks(_branches, 2, factory)
    _assert_equal_everywhere([after for _, after, _ in values])
    before, after, _ = values[0]
    assert np.array_equal(after["nowhere.weight"], before["nowhere.weight"])  # not even decayed
    assert not np.array_equal(after["here.weight"], before["here.weight"])
    for _, _, grads in values:
        assert all(has == ("nowhere" not in name) for step in grads for name, has in step.items())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.outer(self.inner(x).tanh()))


def _tied(rank, world_size):
    model = Tied()
    runner = _wrap(model, optimizer=SGD)
    for step in range(3):
        runner.step([pairs(2, seed=10 * step + rank)])
    assert model.outer.weight is model.inner.weight
    return _weights(model)


def test_tied_parameters_are_reduced_once_and_stay_tied(run_ranks):
    values = run_ranks(_tied, 2)
    _assert_equal_everywhere(values)
    steps = [[pairs(2, seed=10 * step + rank) for rank in range(2)] for step in range(3)]
    expected = _one_process(Tied(), SGD, steps)
    for name, tensor in values[0].items():
        np.testing.assert_allclose(tensor, expected[name], **CLOSE)


class Statistics(nn.Module):
    """Running statistics, and a buffer that only rank 1's batches change."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        if x.shape[0] == 5:
            self.largest = torch.maximum(self.largest, x.max().detach())
        return self.norm(self.layer(x))


def _statistics(rank, world_size):
    model = Statistics()
    lonely = copy.deepcopy(model)
    runner = _wrap(model, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    for step in range(3):
        batch = pairs(4 + rank, seed=10 * step + rank)
        runner.step([batch])
        lonely(batch[0])
    return _weights(model), _weights(lonely)


def test_buffers_are_those_of_rank_zero_on_every_rank_after_every_step(run_ranks):
    values = run_ranks(_statistics, 2)
    _assert_equal_everywhere([after for after, _ in values])
    after, rank_zero = values[0]
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "largest"):
        assert np.array_equal(after[name], rank_zero[name])
    assert after["norm.num_batches_tracked"] == 3


def _different_start(rank, world_size):
    model = nn.Sequential(mlp(seed=rank), nn.BatchNorm1d(2))
    model[0][0].requires_grad_(False)
    model[1].running_mean.fill_(rank)
    model.register_buffer("flags", torch.full((3,), bool(rank)), persistent=False)
    _wrap(model, sample=pairs(2))
    return _weights(model) | {"flags": model.flags.numpy()}


def test_ranks_start_from_the_weights_and_buffers_of_rank_zero(run_ranks):
    values = run_ranks(_different_start, 3)
    _assert_equal_everywhere(values)
    assert np.array_equal(values[2]["0.0.weight"], mlp(seed=0)[0].weight.detach())
    assert not values[2]["1.running_mean"].any() and not values[2]["flags"].any()


def _poisoned(rank, world_size, poison):
    model = mlp()
    runner = _wrap(model, max_grad_norm=1.0)
    runner.step([pairs(2, seed=rank)])
    before, state = _weights(model), copy.deepcopy(runner.state_dict(full=True)["optimizer"]["state"])
    inputs, targets = pairs(2, seed=rank)
    bad = runner.step([(inputs * poison if rank == 1 else inputs, targets)])
    unchanged = all(np.array_equal(value, before[name]) for name, value in _weights(model).items())
    after = runner.state_dict(full=True)["optimizer"]["state"]
    same_state = all(
        torch.equal(after[name][key], value)
        for name, values in state.items()
        for key, value in values.items()
    )
    good = runner.step([pairs(2, seed=rank)])
    return bad.skipped.item(), unchanged, same_state, good.skipped.item()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(run_ranks, poison):
    assert run_ranks(_poisoned, 3, poison) == [(True, True, True, False)] * 3


class Edges(nn.Module):
    """A parameter larger than a bucket, one without elements, a scalar, a wider dtype."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.large = nn.Linear(4, 400)
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        hidden = self.large(x).view(-1, 2, 200).mean(dim=2)
        return (hidden * self.scalar + self.nothing.sum()) * self.wide.float()


def _edges(rank, world_size, bucket_mib):
    model = Edges()
    runner = _wrap(model, optimizer=SGD, bucket_mib=bucket_mib, max_grad_norm=10.0)
    for step in range(3):
        result = runner.step([pairs(2, seed=10 * step + rank)])
    assert model.nothing.grad.shape == (0, 3)
    return _weights(model), result.grad_norm.item()


@pytest.mark.parametrize("bucket_mib", [1e-6, 1e-3, 25.0])
def test_odd_parameters_are_trained_whatever_the_buckets(run_ranks, bucket_mib):
    values = run_ranks(_edges, 2, bucket_mib)
    _assert_equal_everywhere([weights for weights, _ in values])
    assert values[0][1] == values[1][1]
    steps = [[pairs(2, seed=10 * step + rank) for rank in range(2)] for step in range(3)]
    expected = _one_process(Edges(), SGD, steps)
    for name, tensor in values[0][0].items():
        np.testing.assert_allclose(tensor, expected[name], **CLOSE)


def _evaluated(rank, world_size):
    runner = _wrap(mlp(), sample=pairs(1))
    results = [
        runner.evaluate(pairs(rank, seed=rank) if rank else None),
        runner.evaluate(pairs(2, seed=rank)),
    ]
    return [(result.loss_sum.item(), result.count.item()) for result in results]


def test_evaluation_sums_over_shares_of_any_size(run_ranks):
    values = run_ranks(_evaluated, 3)
    assert values[0] == values[1] == values[2]
    model = mlp()
    for (total, count), sizes in zip(values[0], ([0, 1, 2], [2, 2, 2]), strict=True):
        parts = [
            squared_error(model(pairs(n, seed=rank)[0]), pairs(n, seed=rank))[0]
            for rank, n in enumerate(sizes)
        ]
        assert total == pytest.approx(sum(part.item() for part in parts), rel=1e-6)
        assert count == 2 * sum(sizes)


def _seeded(rank, world_size):
    def runner_of(seed):
        torch.manual_seed(0)
        return _wrap(nn.Sequential(nn.Linear(4, 2)), sample=pairs(1), seed=seed)

    runner_of(3)
    first = torch.rand(3).tolist()
    runner_of(3)
    again = torch.rand(3).tolist()
    runner_of(None)
    return first, again, torch.rand(3).tolist()


def test_with_a_seed_ranks_draw_different_numbers_and_the_same_ones_again(run_ranks):
    values = run_ranks(_seeded, 2)
    assert all(first == again for first, again, _ in values)
    assert values[0][0] != values[1][0]
    assert values[0][2] == values[1][2]  # without a seed the process's own state is left alone


def _mixed_sizes(rank, world_size):
    # A batch of 3 ranks' shares in which accumulation differs from rank to rank.
    model = mlp()
    runner = _wrap(model, optimizer=SGD, sample=pairs(1), max_grad_norm=0.05)
    inputs, targets = pairs(6, seed=rank)
    cuts = [[6], [2, 4], [1, 1, 4]][rank]
    result = runner.step(list(zip(inputs.split(cuts), targets.split(cuts), strict=True)))
    return _weights(model), result.grad_norm.item()


def test_clipping_is_that_of_one_process_over_all_microbatches(run_ranks):
    values = run_ranks(_mixed_sizes, 3)
    model = mlp()
    batches = [pairs(6, seed=rank) for rank in range(3)]
    parts = [squared_error(model(batch[0]), batch) for batch in batches]
    (sum(part for part, _ in parts) / 36).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    SGD(model.parameters()).step()
    assert norm > 0.05
    for weights, found in values:
        assert found == pytest.approx(norm.item(), rel=1e-5)
        for name, tensor in _weights(model).items():
            np.testing.assert_allclose(weights[name], tensor, **CLOSE)
