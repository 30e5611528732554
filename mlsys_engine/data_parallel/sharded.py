"""The update when optimizer state is sharded: each rank steps the elements that it owns, for all ranks.

A bucket's reduction (during backward) makes this rank's part of it the sum over ranks, and adds up squares
chunk by chunk while it passes. Those sums travel with the step's statistics; everybody adds them in one order
and so comes to one norm, and to the bits of the unsharded one. Then one pass over the arena steps this rank's
parts and writes the new parameters into every rank's arena.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import comm
from mlsys_engine.data_parallel import state
from mlsys_engine.data_parallel.arenas import BucketMemory, ModelArenas
from mlsys_engine.data_parallel.reductions import Waitable
from mlsys_engine.errors import ConfigError
from mlsys_engine.memory.flat_shard import FlatShard
from mlsys_engine.numerics import GradientScale
from mlsys_engine.optim import NativeOptimizer
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS
from mlsys_engine.optim.shard import OptimizerShard
from mlsys_engine.plan import Plan


def check_shardable(optimizer: torch.optim.Optimizer) -> NativeOptimizer:
    """The optimizer itself when its rule can step parts of parameters; raises ConfigError otherwise."""
    if isinstance(optimizer, NativeOptimizer):
        return optimizer
    kind = type(optimizer)
    raise ConfigError(
        f'DataParallel(shard="optimizer") with {kind.__module__.partition(".")[0]}\'s {kind.__name__}.',
        "Sharding needs the engine's own optimizers, whose rules step any part of a parameter by itself.",
        'Use mls.optim.AdamW or mls.optim.SGD, or shard="none".',
    )


def num_chunks(optimizer: torch.optim.Optimizer) -> int:
    """How many terms the sum of squares of all gradients has."""
    return sum(_chunks_of(parameter) for group in optimizer.param_groups for parameter in group["params"])


class ShardReduction:
    """A Reduction of which each rank keeps its part. Chunks' squares go to their places in `norm_terms`."""

    def __init__(
        self,
        plan: Plan,
        optimizer: NativeOptimizer,
        buckets: Sequence[BucketMemory],
        norm_terms: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        self._partition, self._norm_terms, self._group = plan.partition, norm_terms, group
        rank, places = dist.get_rank(group), _first_places(optimizer)
        self._chunks = [
            _chunk_rows(bucket, places, bounds[rank], bounds[rank + 1])
            for bucket, bounds in zip(buckets, plan.partition, strict=True)
        ]

    def __call__(self, bucket: BucketMemory) -> Waitable:
        """Starts the reduction of one bucket: this rank's part becomes the sum, the rest is left alone."""
        work = comm.reduce_shard(
            bucket.gradients,
            self._partition[bucket.index],
            chunks=self._chunks[bucket.index],
            sums=self._norm_terms,
            group=self._group,
            async_op=True,
        )
        assert work is not None
        return work

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every step reduces all of the gradient."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes nothing."""


class ShardedUpdate:
    """An Update over this rank's parts, after ShardReduction. `norm_terms` are everybody's by then."""

    def __init__(
        self,
        plan: Plan,
        optimizer: NativeOptimizer,
        arenas: ModelArenas,
        norm_terms: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        self._optimizer, self._group, self._norm_terms = optimizer, group, norm_terms
        (self._pair,) = arenas.pairs.values()  # a partition is of float32 buckets alone
        self._parameters = [place.parameter for place in arenas.places]
        rank = dist.get_rank(group)
        self._partition: list[int] = []  # of the whole arena: a row for each bucket
        ranges = []
        for bucket, bounds in zip(arenas.buckets, plan.partition, strict=True):
            begin = int(bucket.gradients.storage_offset())
            self._partition += [begin + bound for bound in bounds]
            if bounds[rank] < bounds[rank + 1]:
                ranges.append((begin + bounds[rank], begin + bounds[rank + 1]))
        self._shard = OptimizerShard(optimizer, self._pair.parameters, ranges)

    def sum_of_squares(self) -> torch.Tensor:
        # One after another from zero, as the unsharded norm adds its chunks (csrc/optim/sum_of_squares.cpp).
        terms = self._norm_terms.numpy()
        total = np.add.accumulate(terms)[-1] if len(terms) else 0.0
        return torch.tensor(float(total), dtype=torch.float64)

    def step(self, scale: GradientScale) -> None:
        """Steps and shares parameters. `.grad` is None afterwards: no rank has the whole reduced gradient."""
        if not scale.skip:
            self._shard.advance()
            comm.reduce_scatter_optimize_all_gather(
                self._pair.gradients.data,
                self._pair.parameters.data,
                self._partition,
                self._shard.table(),
                grad_scale=float(scale.scale),
                is_reduced=True,
                group=self._group,
            )
            torch.autograd.graph.increment_version(self._shard.parameters)
        self._optimizer._opt_called = True  # what torch's schedulers look at to see that a step came first
        for parameter in self._parameters:
            parameter.grad = None

    def _gather(self, flat: torch.Tensor) -> None:
        comm.share_shards(flat, self._partition, group=self._group)

    def optimizer_state(self, model: nn.Module, full: bool) -> dict[str, Any]:
        """With `full` a collective call: everybody gets all of the state."""
        groups = state.optimizer_state(self._optimizer, model, full)["param_groups"]
        own = self._shard.state(self._gather if full else None)
        return {"state": state.copied(own) if full else own, "param_groups": groups}

    def load_optimizer_state(self, model: nn.Module, loaded: Mapping[str, Any]) -> None:
        """Whole tensors (of any layout), or FlatShards of this layout."""
        state.check_names(self._optimizer, model, loaded["state"])
        state.load_optimizer_state(self._optimizer, model, {**loaded, "state": {}})
        self._shard.load(loaded["state"])

    def place_state(self, name: str, key: str) -> FlatShard | None:
        """Where a checkpoint's piece `key` of the state of parameter `name` is loaded to; None: anywhere."""
        return self._shard.place(name, key)


def _chunks_of(parameter: torch.Tensor) -> int:
    return -(-parameter.numel() // CHUNK_ELEMENTS)


def _first_places(optimizer: NativeOptimizer) -> dict[nn.Parameter, int]:
    """For each parameter the place of its first chunk among all terms of the norm."""
    places, position = {}, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            places[parameter] = position
            position += _chunks_of(parameter)
    return places


def _chunk_rows(
    bucket: BucketMemory, places: Mapping[nn.Parameter, int], first: int, end: int
) -> torch.Tensor:
    """(first element, number of elements, place) of those chunks of the bucket that begin in [first, end)."""
    begin, rows = int(bucket.gradients.storage_offset()), []
    for place in bucket.places:
        slot_first = int(place.gradient.storage_offset()) - begin
        slot_end = slot_first + place.gradient.numel()
        if place.parameter not in places:
            continue  # the optimizer does not step it, so the norm leaves it out
        for number, start in enumerate(range(slot_first, slot_end, CHUNK_ELEMENTS)):
            if first <= start < end:
                rows.append((start, min(CHUNK_ELEMENTS, slot_end - start), places[place.parameter] + number))
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)
