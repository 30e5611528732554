"""The gradient noise scale: unbiased estimates, averages of them, and what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.optim import GradientNoiseScale


def test_the_estimates_solve_both_equations_exactly() -> None:
    squared_norm, trace = 3.0, 40.0
    meter = GradientNoiseScale()
    meter.update(squared_norm + trace / 8, squared_norm + trace / 32, 8, 32)
    assert meter.squared_norm == pytest.approx(squared_norm, rel=1e-14)
    assert meter.trace == pytest.approx(trace, rel=1e-14)
    assert meter.noise_scale == pytest.approx(trace / squared_norm, rel=1e-14)


@pytest.mark.parametrize("sizes", [(16, 16, 16, 16), (2, 10, 20, 32)])
def test_the_estimates_are_unbiased_also_for_parts_of_unequal_size(sizes: tuple[int, ...]) -> None:
    # Gaussian gradients of one sample with a known mean and variance in 30 dimensions.
    generator = np.random.default_rng(0)
    mean, deviations = np.full(30, 0.3), np.linspace(0.5, 2.0, 30)
    meter, estimates = GradientNoiseScale(decay=0.0), []
    for _ in range(1500):
        sums = [
            (size * mean + math.sqrt(size) * deviations * generator.standard_normal(30)) for size in sizes
        ]
        small = np.mean([np.sum((part / size) ** 2) for part, size in zip(sums, sizes, strict=True)])
        big = np.sum((np.sum(sums, axis=0) / sum(sizes)) ** 2)
        harmonic = len(sizes) / sum(1 / size for size in sizes)
        meter.update(small, big, harmonic, sum(sizes))
        estimates.append((meter.squared_norm, meter.trace))
    average, spread = np.mean(estimates, axis=0), np.std(estimates, axis=0) / math.sqrt(len(estimates))
    expected = (np.sum(mean**2), np.sum(deviations**2))
    # Four standard errors of the mean: about one failure in 16,000, and the seed is fixed.
    assert np.all(np.abs(average - expected) < 4 * spread)


def test_the_ratio_is_of_averages_without_a_bias_to_zero() -> None:
    meter = GradientNoiseScale(decay=0.9)
    for squared_norm, trace in ((1.0, 10.0), (3.0, 20.0)):
        meter.update(squared_norm + trace / 2, squared_norm + trace / 4, 2, 4)
    weights = (0.9, 1.0)
    assert meter.squared_norm == pytest.approx(np.average([1.0, 3.0], weights=weights))
    assert meter.noise_scale == pytest.approx(np.average([10, 20], weights=weights) / meter.squared_norm)


@pytest.mark.parametrize(
    "measurement",
    [
        (math.nan, 1.0, 2.0, 4.0),
        (math.inf, math.inf, 2.0, 4.0),
        (1.0, 1.0, 4.0, 4.0),
        (1.0, 1.0, math.nan, 4.0),
    ],
)
def test_a_measurement_that_says_nothing_is_left_out(measurement: tuple[float, ...]) -> None:
    meter = GradientNoiseScale()
    meter.update(*map(torch.tensor, measurement))
    assert math.isnan(meter.noise_scale)
    meter.update(3.0, 2.0, 2, 4)
    before = meter.state_dict()
    meter.update(*map(torch.tensor, measurement))
    assert meter.state_dict() == before


def test_a_measurement_reads_no_value() -> None:
    meter = GradientNoiseScale()
    meter.update(*torch.empty(4, device="meta", dtype=torch.float64).unbind())  # where reading one raises
    assert meter.value().is_meta


def test_pure_noise_is_infinite_and_pure_gradient_zero() -> None:
    noise, gradient = GradientNoiseScale(), GradientNoiseScale()
    noise.update(4.0, 1.0, 2, 8)
    assert noise.noise_scale == math.inf
    assert "a larger batch still pays" in noise.describe()
    gradient.update(1.0, 1.0, 2, 8)
    assert gradient.noise_scale == 0.0
    assert "a smaller one would do" in gradient.describe()
    assert "not been measured" in GradientNoiseScale().describe()


@pytest.mark.parametrize(
    ("batch", "advice"),
    [(100, "A larger batch still pays"), (1000, "about as large as pays"), (10_000, "A smaller batch would")],
)
def test_the_description_says_what_another_batch_would_bring(batch: int, advice: str) -> None:
    meter = GradientNoiseScale()
    meter.update(1.0 + 1000 / 4, 1.0 + 1000 / 8, 4, 8)
    assert advice in meter.describe(batch)
    # Doubling a batch of the noise scale: steps from 1 + 1 to 1 + 1/2, samples from 1 + 1 to 1 + 2.
    assert "about 1,000" in meter.describe(batch)
    if batch == 1000:
        assert "Twice the batch of 1,000 would need 25% fewer steps and 50% more data" in meter.describe(
            batch
        )
    assert "batch of 8 " in meter.describe()


def test_the_state_goes_on_where_it_was() -> None:
    meter, again = GradientNoiseScale(), GradientNoiseScale()
    meter.update(3.0, 2.0, 2, 4)
    again.load_state_dict(meter.state_dict())
    for one in (meter, again):
        one.update(5.0, 2.0, 2, 4)
    assert again.state_dict() == meter.state_dict()
    with pytest.raises(CheckpointError, match="4 numbers"):
        again.load_state_dict({"sums": [1.0]})


@pytest.mark.parametrize("batches", [(4, 4), (0, 4), (8, 4), (math.nan, 4)])
def test_batches_that_cannot_be_compared_are_refused(batches: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="Two batch sizes are compared"):
        GradientNoiseScale().update(1.0, 1.0, *batches)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="below 1"):
        GradientNoiseScale(decay=1.0)
    with pytest.raises(ConfigError, match="at least 1"):
        GradientNoiseScale(every=0)
