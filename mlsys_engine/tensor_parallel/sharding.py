"""Which parts of one dim of a tensor each rank of the model axis holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """One dim of a logical tensor, cut into intervals that ranks hold; every other dim is whole."""

    dim: int
    parts: tuple[tuple[tuple[int, int], ...], ...]  # for each rank its (start, stop) intervals of the dim

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape that `rank` holds of a tensor of the logical `shape`."""
        length = sum(stop - start for start, stop in self.parts[rank])
        return tuple(length if dim == self.dim else size for dim, size in enumerate(shape))

    def take(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        """What `rank` holds of a whole tensor: a view where it is one interval, a copy otherwise."""
        pieces = [full.narrow(self.dim, start, stop - start) for start, stop in self.parts[rank]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def assemble(self, locals: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole tensor from what each rank holds, in the order of the ranks."""
        pieces: list[tuple[int, torch.Tensor]] = []
        for intervals, local in zip(self.parts, locals, strict=True):
            lengths = [stop - start for start, stop in intervals]
            starts = [start for start, _ in intervals]
            pieces += zip(starts, local.split(lengths, self.dim), strict=True)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], self.dim)


def even_sharding(shape: tuple[int, ...], dim: int, size: int, segments: tuple[int, ...] = ()) -> Sharding:
    """A dim cut evenly, each segment by itself; the first ranks have one more where it does not divide."""
    lengths = segments or (shape[dim],)
    starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
    parts = []
    for rank in range(size):
        intervals = []
        for start, stop in pairwise(starts):
            low, high = (start + _cut(stop - start, size, edge) for edge in (rank, rank + 1))
            intervals.append((low, high))
        parts.append(tuple(intervals))
    return Sharding(dim=dim, parts=tuple(parts))


def _cut(length: int, size: int, rank: int) -> int:
    """Where the part of `rank` begins, as torch.tensor_split cuts."""
    return rank * (length // size) + min(rank, length % size)
