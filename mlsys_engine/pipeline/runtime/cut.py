"""Cuts a batch into microbatches along its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from mlsys_engine.errors import DataError
from mlsys_engine.numerics import num_samples


def cut(batch: Any, pieces: int) -> list[Any]:
    """`batch` in at most `pieces` parts of nearly equal size along dimension 0, as torch.tensor_split cuts.

    Fewer samples than pieces give one piece a sample. Tensors of one row, or of none (0-d), and everything
    else go to all pieces. Raises DataError for a tensor with another number of rows.
    """
    rows = num_samples(batch)
    num_pieces = max(1, min(pieces, rows))
    size, larger = divmod(rows, num_pieces)
    sizes = [size + (piece < larger) for piece in range(num_pieces)]
    if len(sizes) == 1:
        return [batch]
    starts = [sum(sizes[:piece]) for piece in range(len(sizes))]
    return [_rows(batch, start, size, rows) for start, size in zip(starts, sizes, strict=True)]


def signature(microbatch: Any) -> tuple[Any, ...]:
    """What the shapes of a forward depend on, as a value that can be compared and hashed."""
    if isinstance(microbatch, Mapping):
        microbatch = list(microbatch.items())
    return tuple(
        (tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in tree_leaves(microbatch)
    )


def _rows(batch: Any, start: int, size: int, rows: int) -> Any:
    def take(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or leaf.shape[0] == 1:
            return leaf
        if leaf.shape[0] != rows:
            raise DataError(
                f"A batch of {rows} samples with a tensor of shape {tuple(leaf.shape)}.",
                "A pipeline cuts every tensor of a batch along dimension 0, which counts the samples.",
                "Give the microbatches themselves: a list with more entries than accumulate is not cut.",
            )
        return leaf.narrow(0, start, size)

    if isinstance(batch, Mapping):  # transformers' batches are no nodes of a pytree
        return {key: _rows(value, start, size, rows) for key, value in batch.items()}
    return tree_map(take, batch)
