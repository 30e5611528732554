"""What a model has to offload its activations, and how fast that is."""

from __future__ import annotations

import dataclasses
import os
import time

import torch
from torch import Tensor

from mlsys_engine.activation.offload.base import OffloadError, OffloadOptions, Store
from mlsys_engine.activation.offload.file import FileStore
from mlsys_engine.activation.offload.lane import Kept, Lane
from mlsys_engine.activation.offload.pinned import PinnedStore
from mlsys_engine.memory.meter import Observe


class Offloader:
    """Offloads the activations of one model.

    Files, threads, streams and pinned memory are made at the first put of a device, in each process anew, and
    go with this object and what it keeps. A copy, by pickle too, has the options alone.
    """

    def __init__(self, options: OffloadOptions | None = None) -> None:
        self.options = options or OffloadOptions()
        self._lanes: dict[torch.device, Lane] = {}
        self._num_calls = 0

    def __reduce__(self) -> tuple[type[Offloader], tuple[OffloadOptions]]:
        return type(self), (self.options,)

    def begin_block(self) -> None:
        """A block is called: what is put from now on belongs to another call, even of the same block.

        Waits until tensors of one earlier call at most are still to be written.
        """
        self._num_calls += 1
        for lane in self._lanes_here():
            lane.begin_call()

    def put(self, block: str | int, tensor: Tensor, observe: Observe | None = None) -> Kept:
        """Gives a flat, contiguous tensor of a block away, in the forward.

        The caller lets go of the tensor, and does not change it. `observe` is told of memory that is on the
        device: of the tensor until it is written, of what is loaded until it is read. Waits while more than
        `max_writing_bytes` are on the way. Raises OffloadError when this or an earlier tensor could not be
        written; tensors put after that are not affected.
        """
        return self._lane(tensor.device).put((self._num_calls, block), tensor, observe)

    def begin_backward(self) -> None:
        """The backward of what follows the last offloaded block begins: that block's tensors are loaded."""
        for lane in self._lanes_here():
            lane.begin_backward()

    def _lanes_here(self) -> list[Lane]:
        return [lane for lane in self._lanes.values() if lane.process == os.getpid()]

    def _lane(self, device: torch.device) -> Lane:
        lane = self._lanes.get(device)
        if lane is None or lane.process != os.getpid():
            lane = self._lanes[device] = Lane(self._store(device), self.options.max_writing_bytes)
        return lane

    def _store(self, device: torch.device) -> Store:
        if device.type == "cpu":
            return FileStore(self.options)
        if device.type == "cuda":
            return PinnedStore(device, self.options)
        raise OffloadError(
            f"A tensor on {device} was to be offloaded.",
            "Tensors of the CPU go to a file, those of CUDA devices to pinned host memory.",
            "Keep or recompute the activations of this model's blocks.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """How fast a store takes tensors and gives them back."""

    write_bytes_per_s: float
    read_bytes_per_s: float


def measure_bandwidth(
    device: torch.device, options: OffloadOptions | None = None, *, num_bytes: int = 256 << 20
) -> Bandwidth:
    """Moves `num_bytes` out and back, twice, and times the second pass, when slots and memory are there.

    It waits for the device and takes some tenths of a second. A file's figure is mostly the page cache's as
    long as the machine has memory left for it.
    """
    waiting = dataclasses.replace(options or OffloadOptions(), max_writing_bytes=0)
    offloader = Offloader(waiting)
    part = min(num_bytes, 16 << 20)
    sources = [torch.zeros(part, dtype=torch.uint8, device=device) for _ in range(max(1, num_bytes // part))]
    seconds = []
    for _ in range(2):
        begin = _now(device)
        kept = [offloader.put(0, source) for source in sources]
        middle = _now(device)
        for one in reversed(kept):
            one.read()
        seconds = [middle - begin, _now(device) - middle]
        del kept, one
    moved = part * len(sources)
    return Bandwidth(write_bytes_per_s=moved / seconds[0], read_bytes_per_s=moved / seconds[1])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
