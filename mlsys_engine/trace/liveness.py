"""Which tensors are made before a moment of the forward and used after it.

Every tensor that an operation makes gets a record of when it was made, written and last read; moments are
counted in events. A write through one view is a write to all tensors of that storage. Nothing here keeps a
tensor alive, because what autograd saves is counted at the same time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakIdKeyDictionary

from mlsys_engine.trace.values import Crossing


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Who made a tensor, or wrote to it: a key as in Crossing."""

    producer: str
    output: int | None = None
    operation: str = ""


@dataclass(kw_only=True)
class _Record:
    """One tensor's life."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    storage_bytes: int
    made_at: int
    writes: list[tuple[int, Origin]]
    returns: list[tuple[int, Origin, bool]] = field(default_factory=list)  # (when, by whom, by a block)
    last_read: int = -1
    requires_grad: bool = False

    def origin_at(self, moment: int, moments: Sequence[int]) -> Origin:
        """Who made what the tensor holds at a moment, alike at all of the `moments` that it crosses: the call
        that had returned it at the first of them (a block's, else the outermost), else the operation."""
        written_at, origin = max(
            (write for write in self.writes if write[0] < moment), key=lambda write: write[0]
        )
        first = moments[bisect_right(moments, written_at)]
        returns = [made for made in self.returns if written_at < made[0] < first]
        by_blocks = [made for made in returns if made[2]]
        if by_blocks or returns:
            return (by_blocks or returns)[-1][1]
        return origin


class Lives:
    """The records of one forward. Moments are given by the caller and only grow."""

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._of_tensor = WeakIdKeyDictionary()  # tensor -> its record
        self._of_storage: dict[int, list[_Record]] = {}

    def make(self, tensor: torch.Tensor, moment: int, origin: Origin) -> None:
        """A new tensor; one that is known already stays what it is."""
        if tensor in self._of_tensor:
            return
        storage = tensor.untyped_storage()
        record = _Record(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            storage=storage._cdata,
            storage_bytes=storage.nbytes(),
            made_at=moment,
            writes=[(moment, origin)],
        )
        self._of_tensor[tensor] = record
        self._records.append(record)
        # An address that was used before also finds tensors that are dead: nothing reads those any more.
        self._of_storage.setdefault(record.storage, []).append(record)

    def read(self, tensor: torch.Tensor, moment: int) -> None:
        record = self._of_tensor.get(tensor)
        if record is not None:
            record.last_read = moment
            record.requires_grad |= tensor.requires_grad

    def write(self, tensor: torch.Tensor, moment: int, origin: Origin) -> None:
        if tensor in self._of_tensor:
            for record in self._of_storage[self._of_tensor[tensor].storage]:
                record.writes.append((moment, origin))

    def give_back(
        self, tensor: torch.Tensor, entered: int, left: int, origin: Origin, is_block: bool
    ) -> None:
        """A module call returned the tensor: it is the call's, if it was made or written in there."""
        record = self._of_tensor.get(tensor)
        if record is not None and record.writes[-1][0] > entered:
            record.returns.append((left, origin, is_block))

    def crossings(self, moments: Sequence[int]) -> list[tuple[tuple[Crossing, ...], int]]:
        """For each moment (ascending) the tensors that cross it, and their bytes."""
        crossing: list[list[_Record]] = [[] for _ in moments]
        for record in self._records:
            first, end = bisect_right(moments, record.made_at), bisect_right(moments, record.last_read)
            for index in range(first, end):
                crossing[index].append(record)
        return [
            (
                tuple(_crossing(record, record.origin_at(moment, moments)) for record in records),
                _num_bytes(records),
            )
            for moment, records in zip(moments, crossing, strict=True)
        ]


def _crossing(record: _Record, origin: Origin) -> Crossing:
    return Crossing(
        shape=record.shape,
        dtype=record.dtype,
        producer=origin.producer,
        output=origin.output,
        operation=origin.operation,
        requires_grad=record.requires_grad,
    )


def _num_bytes(records: Sequence[_Record]) -> int:
    """Views of one storage are sent as what they cover together, at most the storage."""
    by_storage: dict[int, int] = {}
    limits = {record.storage: record.storage_bytes for record in records}
    for record in records:
        size = torch.Size(record.shape).numel() * record.dtype.itemsize
        by_storage[record.storage] = by_storage.get(record.storage, 0) + size
    return sum(min(size, limits[storage]) for storage, size in by_storage.items())
