"""A rank's contiguous part of a tensor that is flattened and split over ranks, with its place in the whole.

A checkpoint stores boxes of n-dimensional tensors, and a range of the flattened tensor is rarely one: it is
cut into the few boxes that make it up (in two dimensions at most three: the end of a row, whole rows, the
beginning of a row). Stored so, a tensor has its global shape and name, and loads under any other layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


@dataclass(frozen=True, kw_only=True)
class Box:
    """A part of an n-dimensional tensor that is contiguous in it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, kw_only=True)
class FlatShard:
    """Elements [first, first + data.numel()) of a tensor of `shape`, in its row-major order.

    torch.distributed.checkpoint saves it as part of that tensor and loads into it in place (it looks for
    the methods with double underscores, which therefore find it imported; importing it takes 0.7 s).
    """

    shape: torch.Size
    first: int
    data: torch.Tensor  # 1-d

    def size(self) -> torch.Size:
        """The shape of the whole tensor, of which all ranks have parts."""
        return self.shape

    @property
    def end(self) -> int:
        return self.first + self.data.numel()

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of a tensor that has all elements, 1-d."""
        return whole.reshape(-1)[self.first : self.end]

    def pieces(self) -> Iterator[tuple[Box, torch.Tensor]]:
        """The boxes of this part and their elements, as views in the boxes' sizes."""
        position = 0
        for box in flat_boxes(self.shape, self.first, self.end):
            yield box, self.data[position : position + box.numel].view(box.sizes)
            position += box.numel

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box), properties=TensorProperties.create_from_tensor(piece), size=self.shape
                ),
            )
            for box, piece in self.pieces()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.pieces()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(piece for box, piece in self.pieces() if torch.Size(box.offsets) == index.offset)


def flat_boxes(shape: Sequence[int], first: int, end: int) -> list[Box]:
    """The boxes that make up elements [first, end) of a tensor of `shape`, in order."""
    if first == end:
        return []
    if len(shape) <= 1:
        return [Box(offsets=(first,) * len(shape), sizes=(end - first,) * len(shape))]
    row = math.prod(shape[1:])
    whole_first, whole_end = -(-first // row), end // row
    if whole_first > whole_end:  # all of it inside one row
        return _in_row(shape, whole_end, first - whole_end * row, end - whole_end * row)
    boxes = []
    if first < whole_first * row:
        boxes += _in_row(shape, whole_first - 1, first - (whole_first - 1) * row, row)
    if whole_first < whole_end:
        rest = tuple(shape[1:])
        boxes.append(Box(offsets=(whole_first, *(0 for _ in rest)), sizes=(whole_end - whole_first, *rest)))
    if whole_end * row < end:
        boxes += _in_row(shape, whole_end, 0, end - whole_end * row)
    return boxes


def _in_row(shape: Sequence[int], index: int, first: int, end: int) -> list[Box]:
    return [
        Box(offsets=(index, *box.offsets), sizes=(1, *box.sizes)) for box in flat_boxes(shape[1:], first, end)
    ]


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))
