"""Buffers that a forward changes (BatchNorm's running statistics) are the same on all ranks between steps.

Rank 0's values are broadcast at the end of every step, which is what DDP does before the next forward; at the
end, evaluation, checkpoints and exports see them too. Running statistics of normalisation layers are always
sent. Any other buffer of the state dictionary is sent after a step in which some rank changed it (its version
counter tells, and the marks travel with the loss). Buffers outside the state dictionary are derived from
other things and are sent only once, when the model is laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

Broadcast = Callable[
    [torch.Tensor], Any
]  # starts the broadcast of a 1-d tensor from rank 0; returns its Work


class BufferSync:
    """Knows which buffers to watch; `broadcast` is None in a world of one."""

    def __init__(self, model: nn.Module, broadcast: Broadcast | None) -> None:
        self._broadcast = broadcast
        running: dict[int, tuple[nn.Module, str]] = {}
        watched: dict[int, tuple[nn.Module, str]] = {}
        for module in model.modules() if broadcast is not None else ():
            for name, buffer in module._buffers.items():
                if buffer is None or not buffer.numel():
                    continue
                if isinstance(module, _NormBase):
                    running[id(buffer)] = (module, name)
                elif name not in module._non_persistent_buffers_set:
                    watched[id(buffer)] = (module, name)
        self._running = list(running.values())
        self._watched = [owner for key, owner in watched.items() if key not in running]
        self._in_flight: list[tuple[Any, torch.Tensor, list[torch.Tensor]]] = []
        # Kept alive, so that a buffer that was replaced by a new tensor cannot pass for the old one.
        self._seen: list[tuple[torch.Tensor, int]] = []
        self._remember()

    @property
    def num_watched(self) -> int:
        return len(self._watched)

    def changed(self) -> list[bool]:
        """For each watched buffer, whether this rank changed it since the last `finish`."""
        return [
            buffer is not seen or buffer._version != version
            for buffer, (seen, version) in zip(self._tensors(self._watched), self._seen, strict=True)
        ]

    def start(self) -> None:
        """Starts the broadcast of running statistics."""
        self._send(self._tensors(self._running))

    def finish(self, changed_anywhere: Sequence[bool]) -> None:
        """Also sends the watched buffers that some rank changed, and waits for everything."""
        pairs = zip(self._tensors(self._watched), changed_anywhere, strict=True)
        self._send([buffer for buffer, changed in pairs if changed])
        with torch.no_grad():
            for work, flat, tensors in self._in_flight:
                work.wait()
                parts = flat.split([tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))
        self._in_flight = []
        self._remember()

    def _send(self, tensors: Sequence[torch.Tensor]) -> None:
        if self._broadcast is None:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            group = [tensor for tensor in tensors if tensor.dtype is dtype]
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
            flat = flat.view(torch.uint8) if dtype is torch.bool else flat  # collectives know no bool
            self._in_flight.append((self._broadcast(flat), flat, group))

    def _tensors(self, owners: Sequence[tuple[nn.Module, str]]) -> list[torch.Tensor]:
        return [module._buffers[name] for module, name in owners]  # type: ignore[misc]

    def _remember(self) -> None:
        self._seen = [(buffer, buffer._version) for buffer in self._tensors(self._watched)]
