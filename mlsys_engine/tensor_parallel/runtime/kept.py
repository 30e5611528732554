"""What is kept for backward of values gathered along their tokens: this rank's part, gathered again there.

Korthikanti et al. 2022, section 4.2.2: a projection's weight gradient needs its whole input, which each rank
otherwise keeps. Several readers of one gathered value, as the query, key and value projections, share what
is gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine.tensor_parallel.runtime.collectives import all_parts
from mlsys_engine.tensor_parallel.sharding import Sharding


@dataclass(eq=False)
class Gathered:
    """A value that was gathered, from when it is saved until the last who saved it has read it."""

    part: torch.Tensor
    sharding: Sharding
    group: dist.ProcessGroup
    readers: int = 0  # how many saved it and have not asked for it
    again: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """The whole value, with the strides that it had. All ranks ask in the order of one backward."""
        self.readers -= 1
        found = all_parts(self.part, self.sharding, self.group) if self.again is None else self.again
        self.again = found if self.readers > 0 else None
        return found


@dataclass(frozen=True, eq=False)
class _View:
    """What was saved: a gathered value as one of its readers sees it."""

    of: Gathered
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self) -> torch.Tensor:
        return self.of.read().as_strided(self.size, self.stride, self.offset)


@contextmanager
def parts_kept(recent: Callable[[], list[tuple[torch.Tensor, Gathered]]]) -> Iterator[None]:
    """Inside, autograd keeps the parts of the whole tensors that `recent()` has."""

    def pack(saved: torch.Tensor) -> Any:
        for whole, value in recent():
            if saved.device == whole.device and _same_storage(saved, whole):
                value.readers += 1
                return _View(value, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))
        return saved.detach()  # an output that is saved as it is would hold its own graph

    def unpack(kept: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            found: torch.Tensor = kept.read() if isinstance(kept, _View) else kept
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _same_storage(saved: torch.Tensor, whole: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return (
            saved.layout is torch.strided
            and saved.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        )
