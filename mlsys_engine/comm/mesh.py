"""The ranks of a job as a grid, and the process group of every line and plane of it that a runner uses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mlsys_engine.errors import InternalError


@dataclass(frozen=True)
class Mesh:
    """This rank's place. Axes are ordered; the last varies fastest with the rank."""

    axes: tuple[tuple[str, int], ...]
    rank: int
    _groups: Mapping[frozenset[str], dist.ProcessGroup | None]

    @classmethod
    def build(cls, axes: Sequence[tuple[str, int]], planes: Sequence[Sequence[str]]) -> Mesh:
        """Makes the groups of `planes`, each a set of axes: ranks that differ along these alone are a group.

        Every rank of the job calls it alike, and the axes' product is the job's world. A plane of one rank
        has no group, and one of all ranks has the job's own.
        """
        axes = tuple(axes)
        world = math.prod(size for _, size in axes)
        if world != (dist.get_world_size() if dist.is_initialized() else 1):
            raise InternalError(f"a mesh {axes} in a job of {dist.get_world_size()} ranks")
        rank = dist.get_rank() if dist.is_initialized() else 0
        groups: dict[frozenset[str], dist.ProcessGroup | None] = {}
        for plane in map(frozenset, planes):
            if plane in groups:
                continue
            size = math.prod(size for name, size in axes if name in plane)
            if size in (1, world):
                groups[plane] = dist.group.WORLD if size > 1 else None
                continue
            for ranks in _lines(axes, plane):
                group = dist.new_group(ranks)  # a collective of all ranks, whoever is in the group
                if rank in ranks:
                    groups[plane] = group
        return cls(axes, rank, groups)

    def size(self, axis: str) -> int:
        """1 for an axis that the mesh does not have."""
        return dict(self.axes).get(axis, 1)

    def coordinate(self, axis: str) -> int:
        """This rank's place along an axis; 0 along one that the mesh does not have."""
        place = self.rank
        for name, size in reversed(self.axes):
            if name == axis:
                return place % size
            place //= size
        return 0

    def group(self, *plane: str) -> dist.ProcessGroup | None:
        """The group of a plane that `build` was asked for; None where it is this rank alone.

        Ranks in it are ordered as in the job.
        """
        return self._groups[frozenset(plane)]


def _lines(axes: Sequence[tuple[str, int]], plane: frozenset[str]) -> Iterator[list[int]]:
    """The ranks of each group of a plane, ascending."""
    ranges = [range(size) for _, size in axes]
    lines: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(itertools.product(*ranges)):
        fixed = tuple(at for at, (name, _) in zip(place, axes, strict=True) if name not in plane)
        lines.setdefault(fixed, []).append(rank)
    yield from lines.values()


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's collectives take tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if group.name() == "nccl" else torch.device("cpu")
    )
