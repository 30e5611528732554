"""Squared norms of parts of the batch, for the gradient noise scale; training is not changed by a bit.

The parts are the ranks: a rank's own sum of gradients is complete when a bucket's reduction starts. In a
world of one they are the microbatches, whose gradients autograd adds up in the arenas; what each of them
added is the difference to a copy of the arenas, which is kept from one microbatch to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from mlsys_engine.data_parallel.arenas import BucketMemory
from mlsys_engine.data_parallel.reductions import Waitable
from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import GradientNoiseScale, sum_of_squares
from mlsys_engine.plan import Plan


def check_measurable(plan: Plan) -> None:
    """Raises ConfigError for a plan whose batches have one part alone."""
    if plan.world_size == 1 and plan.accumulate == 1:
        raise ConfigError(
            "noise_scale= was given with one rank and accumulate=1.",
            "The noise is seen where parts of a batch differ: several ranks, or several microbatches.",
            "Pass accumulate=2 or more, or launch more ranks.",
        )


class PartNorms:
    """Measures the parts of every `meter.every`-th step and tells the meter. Every rank has one."""

    def __init__(
        self,
        meter: GradientNoiseScale,
        plan: Plan,
        gradients: Sequence[torch.Tensor],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.meter = meter
        self._gradients, self._group = tuple(gradients), group
        # Under numerics="world_invariant" the arenas hold one microbatch's gradient at a time.
        self._adds_up = plan.numerics != "world_invariant"
        self._num_steps = 0
        self._measures = False  # whether the present step is measured
        self._squares = torch.zeros((), dtype=torch.float64, device=device)  # of this rank's sum, by rank
        self._before: list[torch.Tensor] = []  # the arenas before the present microbatch
        # Sums over parts of: squared norm of the mean gradient, 1 / its count, and 1. The mean of the squared
        # norms belongs to the harmonic mean of the counts, since each expects tr(Sigma) / count of noise.
        self._parts = torch.zeros(3, dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Before a step's first microbatch."""
        self._measures = self._num_steps % self.meter.every == 0
        self._num_steps += 1
        if not self._measures:
            return
        self._squares, self._parts = torch.zeros_like(self._squares), torch.zeros_like(self._parts)
        if self._group is None and self._adds_up:
            for flat in self._gradients:
                flat.zero_()  # of the step before; this one's first microbatch overwrites what it reaches
            self._before = [torch.zeros_like(flat) for flat in self._gradients]

    def before(self, reduction: Callable[[BucketMemory], Waitable]) -> Callable[[BucketMemory], Waitable]:
        """The reduction of a bucket, with the bucket measured when it starts."""

        def reduce(bucket: BucketMemory) -> Waitable:
            if self._measures:
                with torch.no_grad():
                    self._squares = self._squares + sum_of_squares([bucket.gradients])
            return reduction(bucket)

        return reduce

    @torch.no_grad()
    def end_part(self, count: torch.Tensor) -> None:
        """A microbatch of `count` items is in the arenas."""
        if not self._measures or self._group is not None:
            return
        if self._adds_up:
            for before, flat in zip(self._before, self._gradients, strict=True):
                before.sub_(flat)
            squares = sum_of_squares(self._before)
            for before, flat in zip(self._before, self._gradients, strict=True):
                before.copy_(flat)
        else:
            squares = sum_of_squares(self._gradients)
        self._parts = self._parts + _part(squares, count)

    def totals(self, own_count: torch.Tensor) -> torch.Tensor | None:
        """This rank's sums, which are to be added over ranks; None when the step is not measured."""
        if not self._measures:
            return None
        self._before = []
        return self._parts if self._group is None else _part(self._squares, own_count)

    def finish(
        self,
        totals: torch.Tensor,
        *,
        big_squared: torch.Tensor,
        count: torch.Tensor,
        loss_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """Tells the meter and returns its present value, without waiting for the device.

        totals: of all ranks. big_squared: squared norm of the mean gradient over all `count` items, unscaled.
        loss_scale: what the gradients of the parts are multiplied by, if anything.
        """
        squares, inverse_counts, num_parts = totals.unbind()
        small_squared = squares / num_parts
        if loss_scale is not None:
            small_squared = small_squared / loss_scale.to(torch.float64).square()
        self.meter.update(small_squared, big_squared, num_parts / inverse_counts, count)
        return self.meter.value()


def _part(squares: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """What one part adds to the sums; nothing where it counted nothing."""
    count = count.to(squares.device, torch.float64)
    terms = torch.stack([squares / count.square(), 1 / count, torch.ones_like(count)])
    return torch.where(count > 0, terms, torch.zeros_like(terms))
