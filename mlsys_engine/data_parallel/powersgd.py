"""PowerSGD: torch's own communication hook, driven by our reducer.

Each matrix of a bucket is replaced by two thin ones, whose all-reduces are what travels; error feedback keeps
what they miss. Vogels, Karimireddy & Jaggi, NeurIPS 2019. The first steps are plain all-reduces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from mlsys_engine.data_parallel.arenas import BucketMemory
from mlsys_engine.data_parallel.reductions import (
    POWERSGD_RANK,
    POWERSGD_START,
    Reduction,
    Waitable,
    fits_layout,
    layout_of,
)
from mlsys_engine.plan import Plan

_COUNTS = ("iter", "total_numel_before_compression", "total_numel_after_compression", "next_stats_report")
_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")


class PowerSgdReduction(Reduction):
    """One PowerSGDState for all buckets. A bucket under compression is finished before the next one starts.

    The hook chains all-reduces by callbacks. Were two buckets under way at once, the order of their
    collectives would depend on which thread runs a callback, and differ between ranks.
    """

    def __init__(self, plan: Plan, buckets: Sequence[BucketMemory], group: dist.ProcessGroup) -> None:
        settings = dict(plan.algorithms)
        self._last = len(buckets) - 1
        self._world_size = dist.get_world_size(group)
        self._layout = layout_of(plan, group)
        self._state = PowerSGDState(
            process_group=group,
            matrix_approximation_rank=int(settings[POWERSGD_RANK]),
            start_powerSGD_iter=int(settings[POWERSGD_START]),
        )

    @torch.no_grad()
    def __call__(self, bucket: BucketMemory) -> Waitable:
        compresses = self._state.iter >= self._state.start_powerSGD_iter
        future = powerSGD_hook(self._state, _HookBucket(bucket, is_last=bucket.index == self._last))  # type: ignore[arg-type]
        pending = _Sum(future, bucket.gradients, self._world_size)
        if compresses:
            pending.wait()
        return pending

    def state_dict(self) -> dict[str, Any]:
        name, keys, position, has_gauss, cached = self._state.rng.get_state(legacy=True)
        return {
            "layout": self._layout,
            "rng": (
                str(name),
                torch.from_numpy(np.asarray(keys).astype(np.int64)),
                int(position),
                int(has_gauss),
                float(cached),
            ),
            **{count: getattr(self._state, count) for count in _COUNTS},
            **{memory: dict(getattr(self._state, memory)) for memory in _MEMORIES},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not fits_layout(state, self._layout):
            for memory in _MEMORIES:
                getattr(self._state, memory).clear()
            return
        for count in _COUNTS:
            setattr(self._state, count, state[count])
        for memory in _MEMORIES:
            setattr(self._state, memory, {index: tensor.clone() for index, tensor in state[memory].items()})
        name, keys, position, has_gauss, cached = state["rng"]
        self._state.rng.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


class _HookBucket:
    """What the hook asks of a torch GradBucket."""

    def __init__(self, bucket: BucketMemory, is_last: bool) -> None:
        self._bucket, self._is_last = bucket, is_last

    def index(self) -> int:
        return self._bucket.index

    def buffer(self) -> torch.Tensor:
        return self._bucket.gradients

    def gradients(self) -> list[torch.Tensor]:
        views = [place.gradient for place in self._bucket.places if place.gradient.numel()]
        return [view if view.ndim else view.view(1) for view in views]

    def is_last(self) -> bool:
        return self._is_last


class _Sum:
    """The hook's future, whose value is a mean, as a work that leaves the sum in the bucket."""

    def __init__(self, future: torch.futures.Future[Any], flat: torch.Tensor, world_size: int) -> None:
        self._future, self._flat, self._world_size = future, flat, world_size
        self._done = False

    @torch.no_grad()
    def wait(self) -> None:
        if not self._done:
            self._future.wait()
            self._flat.mul_(self._world_size)
        self._done = True
