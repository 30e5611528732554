"""Many tensors laid out in one flat buffer: one reduction or one optimizer segment covers them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 64
Allocate = Callable[[int, torch.dtype], torch.Tensor]  # (numel, dtype) -> zero-filled 1-d tensor


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one tensor lives in the arena; `offset` and `numel` in elements."""

    name: str
    offset: int
    numel: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + self.numel


def layout_slots(named_shapes: Sequence[tuple[str, Sequence[int]]], dtype: torch.dtype) -> tuple[Slot, ...]:
    """Slots in the given order, each on a 64-byte boundary. The padding between them is zero."""
    align = max(1, ALIGNMENT_BYTES // dtype.itemsize)
    slots, offset = [], 0
    for name, shape in named_shapes:
        numel = math.prod(shape)
        slots.append(Slot(name=name, offset=offset, numel=numel, shape=tuple(shape)))
        offset += -(-numel // align) * align
    return tuple(slots)


class FlatArena:
    """A flat buffer and its slots. Gradients, moments and parameters of one model share one layout."""

    def __init__(self, data: torch.Tensor, slots: Sequence[Slot]) -> None:
        self.data = data  # 1-d, contiguous; padding is zero and stays zero under every optimizer rule
        self.slots = tuple(slots)

    @classmethod
    def build(
        cls,
        slots: Sequence[Slot],
        dtype: torch.dtype,
        allocate: Allocate | None = None,
        device: torch.device | str = "cpu",
    ) -> FlatArena:
        """A zero-filled arena for `slots`; `allocate` chooses the memory (default: private)."""
        align = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        numel = -(-max((slot.end for slot in slots), default=0) // align) * align
        data = allocate(numel, dtype) if allocate else torch.zeros(numel, dtype=dtype, device=device)
        return cls(data, slots)

    def view(self, slot: Slot) -> torch.Tensor:
        """The slot's tensor, sharing the arena's memory."""
        return self.data[slot.offset : slot.end].view(slot.shape)
