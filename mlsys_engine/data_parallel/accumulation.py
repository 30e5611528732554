"""How a rank runs its microbatches of a step, and in which order their gradients and losses are added.

A plan's `accumulation` algorithm picks one. Both leave the rank's sum of gradients in the arenas, ready to be
reduced over ranks, and return its sum of losses and count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.errors import DataError
from mlsys_engine.numerics import TreeSum, seed_leaf
from mlsys_engine.optim import LossScaler

Forward = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]  # microbatch -> (loss sum, count)
Lap = Callable[[str], None]  # names the phase that has just ended
Call = Callable[[Any], Any]  # batch -> the model's output
OnPart = Callable[[torch.Tensor], None]  # told the count of a microbatch whose gradient is in the arenas


class Accumulation(Protocol):
    """Runs forward and backward of one step on one rank."""

    def run(
        self, batches: Sequence[Any], forward: Forward, lap: Lap, on_part: OnPart | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss sum and the count of this rank's microbatches, 0-d float64."""

    def evaluate(self, batch: Any, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss sum and the count of a batch, without gradients."""

    def predict(self, batch: Any, call: Call) -> Any:
        """The model's output for a batch, without gradients."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on: the same on every rank, or nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _WholeBatches:
    """Runs what needs no gradients as one process does."""

    def evaluate(self, batch: Any, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        return forward(batch)

    def predict(self, batch: Any, call: Call) -> Any:
        return call(batch)


class InOrder(_WholeBatches):
    """Autograd adds each microbatch's gradient to those before; the last backward overlaps the reduction."""

    def __init__(self, reducer: Reducer, device: torch.device, scaler: LossScaler | None = None) -> None:
        self._reducer, self._device, self._scaler = reducer, device, scaler

    def run(
        self, batches: Sequence[Any], forward: Forward, lap: Lap, on_part: OnPart | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        count = torch.zeros((), dtype=torch.float64, device=self._device)
        self._reducer.start(len(batches))
        for batch in batches:
            part, part_count = forward(batch)
            lap("forward")
            if _counts(part_count):
                _backward(part, self._scaler)
            self._reducer.end_backward()
            if on_part is not None:
                on_part(part_count)
            loss_sum += part.detach()
            count += part_count
            lap("backward")
        return loss_sum, count

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LeafTree(_WholeBatches):
    """Every microbatch is a leaf of one fixed tree over the whole global batch, whoever computes it.

    Each leaf has its own random numbers, and its gradient is computed apart from the others'. A
    rank adds its consecutive leaves as TreeSum does and the ranks' sums go through all_reduce_tree, so the
    bits are those of one tree over all leaves. Missing microbatches, at the end of a list, are leaves of
    zeros. Costs up to log2(leaves of this rank) more buffers of the size of the gradients, a sweep or two
    over them for each leaf, and the overlap of backward with the reduction.
    """

    def __init__(
        self,
        reducer: Reducer,
        flats: Sequence[torch.Tensor],
        *,
        seed: int,
        rank: int,
        world_size: int,
        leaves_of_rank: int,
        scaler: LossScaler | None = None,
    ) -> None:
        self._reducer, self._flats, self._scaler = reducer, tuple(flats), scaler
        self._seed, self._num_leaves = seed, leaves_of_rank
        self._first_leaf, self._leaves_in_all = rank * leaves_of_rank, world_size * leaves_of_rank
        self._gradients = [TreeSum() for _ in flats]
        self._totals = TreeSum()
        self._num_steps = 0

    def run(
        self, batches: Sequence[Any], forward: Forward, lap: Lap, on_part: OnPart | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(batches) > self._num_leaves:
            raise DataError(
                f"step was given {len(batches)} microbatches.",
                f"Under numerics='world_invariant' this rank computes {self._num_leaves} leaves, one a "
                "microbatch.",
                "Cut this rank's part of the global batch into as many, or change virtual_shards.",
            )
        for tree in (*self._gradients, self._totals):
            tree.cancel()  # what a step that raised has left
        self._reducer.start(self._num_leaves)
        for leaf in range(self._num_leaves):
            seed_leaf(self._seed, self._num_steps, self._first_leaf + leaf)
            totals = torch.zeros(2, dtype=torch.float64)
            if leaf < len(batches):
                part, count = forward(batches[leaf])
                lap("forward")
                if _counts(count):
                    _backward(part, self._scaler)
                totals[0], totals[1] = part.detach(), count
            self._reducer.isolate()
            self._reducer.end_backward()
            if on_part is not None:
                on_part(totals[1])
            self._add(totals, is_last=leaf + 1 == self._num_leaves)
            lap("backward")
        self._num_steps += 1
        return totals[0], totals[1]

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self._num_steps, "leaves_in_all": self._leaves_in_all}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_steps = state.get("num_steps", 0)

    def _add(self, totals: torch.Tensor, *, is_last: bool) -> None:
        for tree, term in zip((*self._gradients, self._totals), (*self._flats, totals), strict=True):
            if is_last:
                tree.finish(term)
            else:
                tree.add(term)


def _backward(loss: torch.Tensor, scaler: LossScaler | None) -> None:
    (loss if scaler is None else scaler.scale(loss)).backward()


def _counts(count: torch.Tensor) -> bool:
    # Where the count is at hand, a microbatch that counts nothing needs no backward: its gradient is 0.
    return count.device.type != "cpu" or count.item() > 0
