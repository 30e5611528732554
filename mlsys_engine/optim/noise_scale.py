"""The gradient noise scale: up to which batch size a larger batch still pays.

A gradient over b samples has the expected squared norm |G|^2 + tr(Sigma) / b, where G is the gradient over
all data and Sigma the covariance of single samples' gradients. Two batch sizes give two equations, and so
unbiased estimates of |G|^2 and tr(Sigma). Their ratio is the noise scale B_simple of McCandlish, Kaplan,
Amodei et al. 2018 ("An Empirical Model of Large-Batch Training", section 2.2 and appendix A): the batch size
at which noise and gradient are equally large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlsys_engine.errors import CheckpointError, ConfigError

_NUM_SUMS = 4  # decayed sums of |G|^2, tr(Sigma) and the weights, and the last large batch


class GradientNoiseScale:
    """Averages estimates of |G|^2 and tr(Sigma) over steps; their ratio is the noise scale.

    By hand: `update` with the squared norms of a small and a large batch's mean gradient. In a training:
    `Trainer(noise_scale=GradientNoiseScale())` measures the gradient of each rank before the reduction (on
    one rank that of each microbatch), and logs `noise_scale`. Batches are counted in what the loss counts:
    samples, or tokens of a language model. State stays on the gradients' device; `noise_scale`, `trace`,
    `squared_norm` and `describe` wait for it. Measurements that are not finite, or of equal batches, are left
    out.

    decay: weight that an average keeps at each measurement; single estimates are noisy, and the ratio of
    averages is taken, never the average of ratios. every: steps from one measurement to the next in a
    training.
    """

    def __init__(self, *, decay: float = 0.99, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(
                f"GradientNoiseScale(decay={decay}).",
                "It is the part of an average that stays, from 0 to below 1.",
                "Leave it out for 0.99.",
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(
                f"GradientNoiseScale(every={every!r}).",
                "It is a whole number of steps, at least 1.",
                "Leave it out to measure at every step.",
            )
        self.decay, self.every = decay, every
        self._sums = torch.zeros(_NUM_SUMS, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"GradientNoiseScale(decay={self.decay}, every={self.every})"

    @torch.no_grad()
    def update(
        self,
        small_squared: float | Tensor,
        big_squared: float | Tensor,
        small_batch: float | Tensor,
        big_batch: float | Tensor,
    ) -> None:
        """One measurement: squared 2-norms of the mean gradients over `small_batch` and `big_batch` samples.

        With several small batches pass the mean of their squared norms and, where they are of unequal size,
        the harmonic mean of their sizes. The small ones may be parts of the large one. Tensors are 0-d.
        """
        if not isinstance(small_batch, Tensor) and not isinstance(big_batch, Tensor):
            _check_batches(small_batch, big_batch)
        given = (small_squared, big_squared, small_batch, big_batch)
        device = next((value.device for value in given if isinstance(value, Tensor)), self._sums.device)
        small_squared, big_squared, small_batch, big_batch = (
            torch.as_tensor(value, dtype=torch.float64, device=device) for value in given
        )
        squared_norm = (big_batch * big_squared - small_batch * small_squared) / (big_batch - small_batch)
        trace = (small_squared - big_squared) / (1 / small_batch - 1 / big_batch)
        new = torch.stack([squared_norm, trace, torch.ones_like(trace)])
        self._sums = sums = self._sums.to(device)
        averaged = self.decay * sums[:3] + (1 - self.decay) * new
        counts = torch.isfinite(new).all() & (big_batch > small_batch)
        # In place, so that a captured graph finds its own results when it is replayed.
        sums.copy_(torch.where(counts, torch.cat([averaged, big_batch[None]]), sums))

    def value(self) -> Tensor:
        """The noise scale as a 0-d float64 tensor, which is not waited for; as `noise_scale` has it."""
        squared_norm, trace, weight, _ = self._sums.unbind()
        ratio = torch.where(squared_norm > 0, trace.clamp(min=0) / squared_norm, torch.inf)
        return torch.where(weight > 0, ratio, torch.nan)

    @property
    def noise_scale(self) -> float:
        """tr(Sigma) / |G|^2, in samples; nan before the first measurement, inf where only noise was seen."""
        return float(self.value())

    @property
    def squared_norm(self) -> float:
        """The estimate of |G|^2, the squared norm of the gradient without noise. It may come out negative."""
        return self._average(0)

    @property
    def trace(self) -> float:
        """The estimate of tr(Sigma), the variance of one sample's gradient. It may come out negative."""
        return self._average(1)

    def describe(self, batch_size: float | None = None) -> str:
        """In words: what a larger or a smaller batch than `batch_size` (the last one measured) would bring.

        From the paper's model: at batch size B the steps to a loss are proportional to 1 + noise_scale / B,
        and the samples to 1 + B / noise_scale.
        """
        noise = self.noise_scale
        batch = float(self._sums[3]) if batch_size is None else batch_size
        if math.isnan(noise) or not batch > 0:
            return "The gradient noise scale has not been measured yet."
        if math.isinf(noise):
            return (
                f"The gradient noise scale exceeds a batch of {batch:,.0f}, whose noise hides the gradient; "
                "a larger batch still pays. Averages over more steps will tell how large."
            )
        if noise == 0:
            return (
                "The gradient noise scale is 0: parts of a batch agree, and a smaller one would do as well."
            )
        fewer_steps = 1 - (1 + noise / (2 * batch)) / (1 + noise / batch)
        more_data = (1 + 2 * batch / noise) / (1 + batch / noise) - 1
        return (
            f"The gradient noise scale is about {_figure(noise)}: batches far below it gain from growing "
            "almost in proportion, batches far above it hardly at all. "
            f"Twice the batch of {batch:,.0f} would need {fewer_steps:.0%} fewer steps and {more_data:.0%} "
            f"more data. {_advice(batch / noise)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values; waits for the device."""
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        sums = torch.tensor(state.get("sums", ()), dtype=torch.float64)
        if sums.shape != self._sums.shape:
            raise CheckpointError(
                f"A noise scale's state of shape {tuple(sums.shape)}.",
                f"It holds {_NUM_SUMS} numbers.",
                "Start with a new GradientNoiseScale instead.",
            )
        self._sums = sums

    def _average(self, index: int) -> float:
        weighted, weight = float(self._sums[index]), float(self._sums[2])
        return weighted / weight if weight else math.nan


def _check_batches(small_batch: float, big_batch: float) -> None:
    if not 0 < small_batch < big_batch:
        raise ConfigError(
            f"GradientNoiseScale.update(small_batch={small_batch}, big_batch={big_batch}).",
            "Two batch sizes are compared: small_batch is positive and below big_batch.",
            "Pass the samples of a microbatch or of one rank, and those of the whole batch.",
        )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _advice(ratio: float) -> str:
    if ratio < 0.5:
        return "A larger batch still pays."
    if ratio <= 2:
        return "The batch is about as large as pays."
    return "A smaller batch would reach the same loss with less data in hardly more steps."
