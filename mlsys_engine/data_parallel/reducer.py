"""The reducer: gradients go to the other ranks while backward is still running.

Three calls: `ready(parameter)` when a gradient is final, `launch(bucket)` when a bucket is, `finish()` at the
end of the last backward. Autograd's post-accumulate hooks call `ready`; a pipeline schedule calls `launch`
itself (`automatic=False`). What a launch does is given at construction: all-reduce here, something else under
a shard.

Buckets are launched in their own order on every rank, whatever the order in which gradients become ready: a
bucket that is ready before an earlier one waits for it, since ranks must agree on the order of their
collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mlsys_engine.data_parallel.arenas import BucketMemory, Place
from mlsys_engine.errors import ConfigError, InternalError

Reduce = Callable[
    [BucketMemory], Any
]  # starts to sum a bucket's gradients in place; returns what to wait for


class Reducer:
    """Sums the gradients of `buckets` over ranks, overlapped with backward.

    `reduce` is None in a world of one: everything happens but the communication. Between `start` and `settle`
    the gradient of a parameter that was used is its place in the arena; before the first microbatch that uses
    it, `.grad` is None, so that autograd hands over its own tensor, which is copied once: cheaper than
    zeroing the place and adding to it.
    """

    def __init__(
        self, buckets: Sequence[BucketMemory], reduce: Reduce | None, automatic: bool = True
    ) -> None:
        self._buckets = tuple(buckets)
        self._reduce = reduce
        self._automatic = automatic
        self._places: dict[nn.Parameter, Place] = {
            place.parameter: place for bucket in buckets for place in bucket.places
        }
        self._used = [False] * len(self._places)
        self._fired: set[int] = set()  # places that became ready in the current backward
        self._missing: list[int] = []  # for each bucket, places that are not ready in the current backward
        self._works: list[Any] = []
        self._backwards_left = 0
        self._active = False
        self.num_launched = 0
        self.num_overlapped = 0  # buckets of the last step that were launched before its last backward ended
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self.ready) for parameter in self._places
        ]

    @property
    def num_buckets(self) -> int:
        return len(self._buckets)

    @property
    def used(self) -> Sequence[bool]:
        """For each parameter, in the order of the buckets, whether this rank has a gradient for it."""
        return self._used

    def start(self, num_backwards: int) -> None:
        """Opens a step of `num_backwards` backwards, of which only the last communicates. Zero is allowed."""
        self._used = [False] * len(self._places)
        self._works = []
        self._backwards_left = num_backwards
        self._active = True
        self.num_launched = self.num_overlapped = 0
        self._begin_backward()
        for parameter in self._places:
            parameter.grad = None

    def ready(self, parameter: nn.Parameter) -> None:
        """Autograd has finished adding to this parameter's gradient for this backward."""
        if not self._active:
            return  # the caller's own backward, outside a step
        place = self._places[parameter]
        if place.bucket < self.num_launched:
            raise ConfigError(
                f"Parameter {place.name} received a gradient after its bucket was already being reduced.",
                "Every parameter finishes its gradient once in the last backward of a step.",
                "Reentrant checkpointing of a shared parameter does this: use mls.activation.checkpoint, or "
                "torch.utils.checkpoint with use_reentrant=False.",
            )
        self._adopt(place)
        if place.index in self._fired:
            return
        self._fired.add(place.index)
        self._missing[place.bucket] -= 1
        if self._automatic and self._backwards_left == 1:
            while self.num_launched < len(self._buckets) and not self._missing[self.num_launched]:
                self.launch(self.num_launched)

    def launch(self, bucket: int) -> None:
        """Starts the reduction of a bucket; parameters without a gradient on this rank contribute zeros."""
        if bucket != self.num_launched or not self._active:
            raise InternalError(f"bucket {bucket} launched out of turn: bucket {self.num_launched} is next")
        memory = self._buckets[bucket]
        for place in memory.places:
            if not self._used[place.index]:
                place.gradient.zero_()
        if self._reduce is not None and memory.gradients.numel():
            self._works.append(self._reduce(memory))
        self.num_launched += 1
        if self._backwards_left:
            self.num_overlapped += 1

    def isolate(self) -> None:
        """Leaves the present backward's gradient alone in the arenas: zeros where it did not reach.

        The next backward then starts from nothing instead of adding to this one.
        """
        for place in self._places.values():
            if place.index not in self._fired:
                place.gradient.zero_()
            place.parameter.grad = None

    def end_backward(self) -> None:
        """One backward (or its omission, for a microbatch that counts nothing) is over."""
        if self._backwards_left == 0:
            raise InternalError("more backwards ended than the step was started with")
        self._backwards_left -= 1
        self._begin_backward()

    def finish(self) -> None:
        """Launches what is left, in order. Called once on every rank after the last backward."""
        if self._backwards_left:
            raise InternalError(f"finish with {self._backwards_left} backwards to come")
        while self.num_launched < len(self._buckets):
            self.launch(self.num_launched)

    def wait(self) -> None:
        """Waits for every reduction (on a device: makes its stream wait)."""
        for work in self._works:
            work.wait()
        self._works = []

    def settle(self, used_anywhere: Sequence[bool]) -> None:
        """Closes the step: `.grad` is the reduced gradient, or None for a parameter that no rank used."""
        for place in self._places.values():
            place.parameter.grad = place.gradient if used_anywhere[place.index] else None
        self._active = False

    def cancel(self) -> None:
        """Leaves a step that raised: hooks rest until the next start."""
        self._active = False
        self._works = []

    def close(self) -> None:
        """Removes the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()

    def _begin_backward(self) -> None:
        self._fired = set()
        self._missing = [len(bucket.places) for bucket in self._buckets]

    @torch.no_grad()
    def _adopt(self, place: Place) -> None:
        gradient = place.parameter.grad
        if gradient is not place.gradient and gradient is not None:
            place.gradient.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            place.parameter.grad = place.gradient
        self._used[place.index] = True
