"""Activations of a GPU in pinned host memory, moved by two streams beside the one that computes.

No call here makes the host wait: streams wait for events. Memory is given back to the allocator in the order
of the stream that computes, after that stream has been made to wait for the copy, so that the allocator,
which knows nothing of the copy streams, may give it to whatever that stream does next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlsys_engine.activation.offload.base import OffloadError, OffloadOptions, Slot, Store, Transfer
from mlsys_engine.activation.offload.extents import Extents, rounded


class StreamTransfer(Transfer):
    """A copy on a stream. `owner` is the stream that computes with the tensor.

    `users` are the streams that would use its slot or its memory without waiting for it otherwise. A write
    has none: the source is held until it has ended, and the slot's next write takes the same stream.
    """

    def __init__(
        self,
        tensor: Tensor,
        event: torch.cuda.Event,
        owner: torch.cuda.Stream,
        users: tuple[torch.cuda.Stream, ...] = (),
    ) -> None:
        super().__init__(tensor)
        self.event = event
        self._owner, self._users = owner, users

    def has_ended(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self._owner.wait_event(self.event)
        reader = torch.cuda.current_stream(self._owner.device)
        if reader != self._owner and self.tensor is not None:
            reader.wait_event(self.event)
            self.tensor.record_stream(reader)

    def may_reuse(self) -> bool:
        for stream in self._users:
            stream.wait_event(self.event)
        return True


class PinnedStore(Store):
    """Slots of pinned slabs, which are kept and used again. Raises OffloadError when the host has no more."""

    def __init__(self, device: torch.device, options: OffloadOptions) -> None:
        self._device, self._slab_bytes = device, options.slab_bytes
        self._slabs: list[tuple[Tensor, Extents]] = []
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def num_host_bytes(self) -> int:
        """How much pinned memory it has."""
        return sum(slab.nbytes for slab, _ in self._slabs)

    def take(self, num_bytes: int) -> Slot:
        for number, (_, extents) in enumerate(self._slabs):
            start = extents.take(num_bytes)
            if start is not None:
                return Slot(start, num_bytes, number)
        self._slabs.append(self._new_slab(num_bytes))
        return self.take(num_bytes)

    def give_back(self, slot: Slot) -> None:
        self._slabs[slot.slab][1].give_back(slot.start, slot.num_bytes)

    def write(self, tensor: Tensor, slot: Slot) -> StreamTransfer:
        owner = torch.cuda.current_stream(self._device)
        self._out.wait_stream(owner)  # the tensor may still be computed
        with torch.cuda.stream(self._out):
            self._host(slot, tensor.dtype).copy_(tensor, non_blocking=True)
            event = self._out.record_event()
        return StreamTransfer(tensor, event, owner)

    def load(self, slot: Slot, written: Transfer, dtype: torch.dtype) -> StreamTransfer:
        assert isinstance(written, StreamTransfer)
        owner = torch.cuda.current_stream(self._device)
        host = self._host(slot, dtype)
        tensor = torch.empty(host.numel(), dtype=dtype, device=self._device)
        self._back.wait_stream(owner)  # which may still compute with what was in this memory before
        self._back.wait_event(written.event)
        with torch.cuda.stream(self._back):
            tensor.copy_(host, non_blocking=True)
            event = self._back.record_event()
        return StreamTransfer(tensor, event, owner, (owner, self._out))

    def _host(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        slab = self._slabs[slot.slab][0]
        return slab[slot.start : slot.start + slot.num_bytes].view(dtype)

    def _new_slab(self, num_bytes: int) -> tuple[Tensor, Extents]:
        size = rounded(max(self._slab_bytes, num_bytes))
        try:
            slab = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise OffloadError(
                f"No slab of {size} bytes of pinned host memory could be had besides the "
                f"{self.num_host_bytes} that offload already has: {error}",
                "Activations stay in pinned host memory until the backward has read them.",
                "Offload fewer blocks, or raise the limit of locked memory (ulimit -l) or of the container.",
            ) from error
        return slab, Extents(size)
