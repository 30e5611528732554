"""Measuring the gradient noise scale: what it finds, and that it leaves training alone."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from mlsys_engine import optim, strategies
from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import GradientNoiseScale
from mlsys_engine.strategies import DataParallel
from tests.data_parallel.models import alone, mlp, pairs, squared_error
from tests.data_parallel.sharding import Uneven, weights_of

ADAMW = functools.partial(optim.AdamW, lr=0.01, weight_decay=0.1)
SIZES = (1, 3, 4)  # samples of the microbatches of a rank
INVARIANT = {"numerics": "world_invariant", "seed": 0, "accumulate": 1}


def _alone(meter, **options):
    options = {"accumulate": len(SIZES), **options}
    return alone(mlp(), ADAMW, max_grad_norm=0.5, noise_scale=meter, **options)


def _wrap(model, meter, **options):
    shard = options.pop("shard", "none")
    return strategies.wrap(
        model,
        optimizer=ADAMW,
        loss=squared_error,
        strategy=DataParallel(bucket_mib=1e-4, shard=shard),
        noise_scale=meter,
        max_grad_norm=0.5,
        sample=pairs(1),
        **{"accumulate": len(SIZES), **options},
    )


def _mean_squares(model, parts):
    """In float64: the squared norm of each part's mean gradient, and of that of all together."""
    model, norms, total, count = model.double(), [], 0.0, 0
    for inputs, targets in parts:
        loss, num = squared_error(model(inputs.double()), (inputs, targets.double()))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        norms.append((gradient / num).square().sum().item())
        total, count = total + gradient, count + num
    return norms, (total / count).square().sum().item(), count


def _expected(parts):
    meter = GradientNoiseScale()
    norms, whole, count = _mean_squares(mlp(), parts)
    harmonic = len(parts) / sum(1 / targets.numel() for _, targets in parts)
    meter.update(np.mean(norms), whole, harmonic, count)
    return meter


def _joined(batches):
    return tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"precision": "bf16"}])
def test_on_one_rank_the_parts_are_the_microbatches(options):
    meter = GradientNoiseScale()
    runner = _alone(meter, **options)
    parts = [pairs(size, seed=size) for size in SIZES]
    result = runner.step([*parts, (torch.zeros(0, 4), torch.zeros(0, 2))])  # a part that counts nothing
    expected = _expected(parts)
    # fp32 sums of a few dozen products, in bf16 with 8 bits each; cancellation takes up to two digits.
    tolerance = 1e-5 if not options else {"fp16": 2e-2, "bf16": 0.2}[options["precision"]]
    assert meter.squared_norm == pytest.approx(expected.squared_norm, rel=tolerance)
    assert meter.trace == pytest.approx(expected.trace, rel=tolerance)
    assert result.measured["noise_scale"].item() == meter.noise_scale


def _by_rank(rank, world_size, options):
    meter = GradientNoiseScale()
    runner = _wrap(mlp(), meter, **options)
    # The last rank has nothing to feed: it is no part.
    batches = [pairs(rank + 1, seed=10 * rank + part) for part in range(2)] if rank < world_size - 1 else []
    runner.step(batches)
    return meter.squared_norm, meter.trace, meter.noise_scale


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shard": "optimizer"},
        pytest.param({"precision": "fp16"}, marks=pytest.mark.slow),
        pytest.param(INVARIANT, marks=pytest.mark.slow),
    ],
    ids=["whole", "sharded", "fp16", "world-invariant"],
)
def test_on_several_ranks_the_parts_are_the_ranks(run_ranks, options):
    world_size = 4
    values = run_ranks(_by_rank, world_size, options)
    batches = [
        [pairs(rank + 1, seed=10 * rank + part) for part in range(2)] for rank in range(world_size - 1)
    ]
    expected = _expected([_joined(own) for own in batches])
    assert values == [values[0]] * world_size
    tolerance = 2e-2 if "precision" in options else 1e-5
    assert values[0][:2] == pytest.approx((expected.squared_norm, expected.trace), rel=tolerance)


def test_under_world_invariant_numerics_one_rank_measures_its_leaves():
    meter = GradientNoiseScale()
    runner = _alone(meter, **INVARIANT)
    parts = [pairs(size, seed=size) for size in SIZES]
    runner.step(parts)
    assert meter.trace == pytest.approx(_expected(parts).trace, rel=1e-5)


def _train(rank, world_size, meters, options):
    """Weights and results with a meter that measures every other step, or with none."""
    model = Uneven()
    meter = GradientNoiseScale(every=2) if meters else None
    runner = _wrap(model, meter, **options)
    results, measured = [], []
    for step in range(6):
        batches = [pairs(size + rank, seed=10 * step + size) for size in SIZES]
        if step == 3:
            batches[0][0].fill_(math.inf)
        result = runner.step(batches)
        results.append((str(result.loss.item()), str(result.grad_norm.item()), bool(result.skipped)))
        measured.append("noise_scale" in result.measured)
    return results, weights_of(model), measured


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        pytest.param(1, INVARIANT, marks=pytest.mark.slow),
        pytest.param(3, {}, marks=pytest.mark.slow),
        (2, {"shard": "optimizer"}),
        pytest.param(2, {"precision": "fp16"}, marks=pytest.mark.slow),
    ],
)
def test_measuring_changes_no_bit_of_the_training(run_ranks, world_size, options):
    without = run_ranks(_train, world_size, False, options)
    measured = run_ranks(_train, world_size, True, options)
    for (results, weights, when), (others, expected, never) in zip(measured, without, strict=True):
        assert results == others
        assert all(np.array_equal(weights[name], expected[name]) for name in weights)
        assert when == [True, False] * 3 and not any(never)


def test_a_step_with_a_bad_gradient_or_one_part_is_no_measurement():
    meter = GradientNoiseScale()
    runner = _alone(meter)
    runner.step([pairs(2), (torch.full((2, 4), math.inf), torch.zeros(2, 2))])
    runner.step([pairs(2)])
    runner.step([])
    assert math.isnan(meter.noise_scale)


def test_the_averages_are_part_of_the_state():
    first, second = GradientNoiseScale(), GradientNoiseScale()
    runner, other = (_alone(meter) for meter in (first, second))
    for step in range(3):
        runner.step([pairs(size, seed=10 * step + size) for size in SIZES])
    other.load_state_dict(runner.state_dict(full=True))
    assert second.state_dict() == first.state_dict()
    assert second.noise_scale > 0


def test_one_rank_without_accumulation_cannot_measure_and_is_told_so():
    with pytest.raises(ConfigError, match="Pass accumulate=2 or more"):
        _alone(GradientNoiseScale(), accumulate=1)
