"""A store whose transfers end when a test says so."""

from __future__ import annotations

import torch
from torch import Tensor

from mlsys_engine.activation.offload import Kept
from mlsys_engine.activation.offload.base import Slot, Store, Transfer
from mlsys_engine.activation.offload.extents import Extents
from mlsys_engine.activation.offload.lane import Lane

NUMEL = 1000


class SlowTransfer(Transfer):
    """Ends when the test says so, or when somebody waits for it."""

    def __init__(self, store: SlowStore, tensor: Tensor, slot: Slot, *, writes: bool) -> None:
        super().__init__(tensor)
        self._store, self._slot, self._writes, self._ended = store, slot, writes, False

    def end(self) -> None:
        if self._ended or self.tensor is None:
            return
        if self._store.is_broken:
            self.failure = ("It is broken.", "A store.", "Mend it.")
            self.tensor = None
        elif self._writes:
            self._store.contents[self._slot.start] = self.tensor.clone()
            self.tensor = None
        else:
            self.tensor.copy_(self._store.contents[self._slot.start])
        self._ended = True

    def has_ended(self) -> bool:
        return self._ended

    def wait(self) -> None:
        self._store.waits.append(self.num_bytes)
        self.end()

    def may_reuse(self) -> bool:
        return self._ended

    def give_up(self) -> None:
        super().give_up()
        self.end()


class SlowStore(Store):
    """A dictionary. It writes down which slots were loaded, in which order, and how often somebody waited."""

    def __init__(self) -> None:
        self.contents: dict[int, Tensor] = {}
        self.extents = Extents()
        self.writes: list[SlowTransfer] = []
        self.loads: list[int] = []
        self.waits: list[int] = []
        self.is_broken = False

    def take(self, num_bytes: int) -> Slot:
        start = self.extents.take(num_bytes)
        assert start is not None
        return Slot(start, num_bytes)

    def give_back(self, slot: Slot) -> None:
        self.extents.give_back(slot.start, slot.num_bytes)

    def write(self, tensor: Tensor, slot: Slot) -> Transfer:
        self.writes.append(SlowTransfer(self, tensor, slot, writes=True))
        return self.writes[-1]

    def load(self, slot: Slot, written: Transfer, dtype: torch.dtype) -> Transfer:
        self.loads.append(slot.start // 4096)
        tensor = torch.empty(slot.num_bytes // dtype.itemsize, dtype=dtype)
        return SlowTransfer(self, tensor, slot, writes=False)


def values(number: int, numel: int = NUMEL) -> Tensor:
    return torch.full((numel,), float(number))


def put_blocks(lane: Lane, num_blocks: int = 4, num_tensors: int = 2) -> list[Kept]:
    """Tensors 0, 1 of block 0, tensors 2, 3 of block 1, and so on: a tensor's number is its page's."""
    numbers = range(num_blocks * num_tensors)
    return [lane.put(number // num_tensors, values(number), None) for number in numbers]
