"""How a bucket of gradients is summed over ranks, and what a rank keeps for the next time.

A plan's algorithm for "gradients" picks one from `REDUCTIONS`. All leave the SUM over ranks in the bucket:
the mean is taken by the optimizer's step.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.data_parallel.arenas import BucketMemory
from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import Plan

# Algorithm -> module:class, called with (plan, buckets, group)
REDUCTIONS = {
    "all_reduce": "mlsys_engine.data_parallel.reductions:PlainReduction",
    "all_reduce_tree": "mlsys_engine.data_parallel.reductions:TreeReduction",
    "all_reduce_bf16": "mlsys_engine.data_parallel.reductions:EncodedReduction",
    "all_reduce_int8": "mlsys_engine.data_parallel.reductions:EncodedReduction",
    "all_reduce_powersgd": "mlsys_engine.data_parallel.powersgd:PowerSgdReduction",
}
POWERSGD_RANK, POWERSGD_START = "powersgd_rank", "powersgd_start_step"  # in Plan.algorithms


class Waitable(Protocol):
    """A reduction under way."""

    def wait(self) -> Any:
        """Returns when the bucket holds the sum."""


class Reduction(Protocol):
    """Called with every bucket of a step, in the same order on every rank."""

    def __call__(self, bucket: BucketMemory) -> Waitable:
        """Starts to sum the bucket's gradients over ranks, in place."""

    def finish(self) -> None:
        """All of a step's buckets were started: what their sums add to the statistics is in them now.

        On a device its stream waits for that. Nothing to do where the statistics queue behind the buckets.
        """

    def state_dict(self) -> dict[str, Any]:
        """What this rank alone carries from step to step: plain values and live tensors, or nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; starts anew, with a warning, where it does not fit."""


def make_reduction(
    plan: Plan, buckets: Sequence[BucketMemory], group: dist.ProcessGroup, device: torch.device
) -> Reduction:
    """The reduction that the plan names. Called when the group has communicated at least once."""
    if plan.compression in comm.COMPRESSIONS and device.type != "cpu":
        raise ConfigError(
            f"DataParallel(compression={plan.compression!r}) on {device}.",
            "bf16 and int8 encode CPU tensors between hosts, in this version.",
            'Use compression="powersgd", or leave it out.',
        )
    module, name = REDUCTIONS[dict(plan.algorithms)["gradients"]].split(":")
    reduction: Reduction = getattr(importlib.import_module(module), name)(plan, buckets, group)
    return reduction


class PlainReduction(Reduction):
    """The all-reduce of the process group, in the gradients' own type."""

    def __init__(self, _plan: Plan, _buckets: Sequence[BucketMemory], group: dist.ProcessGroup) -> None:
        self._group = group

    def __call__(self, bucket: BucketMemory) -> Waitable:
        work: dist.Work = dist.all_reduce(bucket.gradients, group=self._group, async_op=True)
        return work

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class TreeReduction(PlainReduction):
    """The all-reduce in the order of the canonical tree over ranks."""

    def __call__(self, bucket: BucketMemory) -> Waitable:
        work = comm.all_reduce_tree(bucket.gradients, group=self._group, async_op=True)
        assert work is not None
        return work


class EncodedReduction(Reduction):
    """bf16 or int8 between hosts, with error feedback: one residual a bucket, of the bucket's size.

    A rank's residual is zero, and its memory never touched, where other ranks of its host do the encoding.
    The sum of all ranks' residuals is the gradient that has not been delivered yet.
    """

    def __init__(self, plan: Plan, buckets: Sequence[BucketMemory], group: dist.ProcessGroup) -> None:
        assert plan.compression is not None
        self._compression, self._group = plan.compression, group
        self._residuals = [torch.zeros(bucket.gradients.numel()) for bucket in buckets]
        self._layout = layout_of(plan, group)
        if comm.num_hosts(group) == 1 and dist.get_rank(group) == 0:
            warnings.warn(
                f"compression={plan.compression!r} has no effect: all {dist.get_world_size(group)} ranks "
                "share memory on one host, and only what travels between hosts is compressed.",
                stacklevel=2,
            )

    def __call__(self, bucket: BucketMemory) -> Waitable:
        work = comm.all_reduce_compressed(
            bucket.gradients,
            self._compression,
            self._residuals[bucket.index],
            group=self._group,
            async_op=True,
        )
        assert work is not None
        return work

    def state_dict(self) -> dict[str, Any]:
        return {"layout": self._layout, "residuals": list(self._residuals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        fits = fits_layout(state, self._layout)
        saved = state["residuals"] if fits else [torch.zeros(())] * len(self._residuals)
        for residual, value in zip(self._residuals, saved, strict=True):
            residual.copy_(value)


def layout_of(plan: Plan, group: dist.ProcessGroup) -> str:
    """Names everything that decides which rank keeps what of which gradient: hosts, compression, buckets."""
    buckets = hashlib.sha256(repr(plan.buckets).encode()).hexdigest()[:16]
    return f"{plan.compression}; {comm.describe_transports(group)}; buckets {buckets}"


def fits_layout(state: Mapping[str, Any], layout: str) -> bool:
    """Whether a saved state is of this layout; warns when it is not."""
    if state.get("layout") == layout:
        return True
    warnings.warn(
        f"The compression's memory of past steps is that of {state.get('layout', 'another training')!r} and "
        f"this is {layout!r}: error feedback starts anew from zero, so a little gradient is lost and "
        "the losses are not those of the run that was never stopped.",
        stacklevel=3,
    )
    return False
