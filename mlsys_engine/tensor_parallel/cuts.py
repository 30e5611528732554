"""How a cut of a weight shows in the values computed from it: the algebra behind the automatic plan.

A dim of a value is a product of *factors*, outermost first: (batch * heads) is two. A factor may carry a
*cut*: along it the value is in as many parts as ranks. Reshapes regroup and split factors. Where a split
would separate what belongs to one rank, the cut has to end there, or the weight wants segments: a fused
query-key-value projection is cut within each of its thirds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Place = tuple[str, int]  # parameter FQN and its dim


@dataclass(eq=False)
class Cut:
    """Weights that are cut together. Cuts that meet become one; one that ends for a reason has failed."""

    places: dict[Place, tuple[int, ...]]  # what is cut -> lengths of its segments
    columns: list[Place] = field(default_factory=list)  # those of the places that the cut began with
    reason: str | None = None
    wanted_segments: tuple[int, ...] = ()
    merged_into: Cut | None = None

    def root(self) -> Cut:
        """The cut that this one has become a part of."""
        found = self
        while found.merged_into is not None:
            found = found.merged_into
        return found

    def join(self, other: Cut) -> None:
        """Both cuts are one from now on."""
        mine, theirs = self.root(), other.root()
        if mine is theirs:
            return
        mine.places |= theirs.places
        mine.columns += theirs.columns
        mine.wanted_segments = mine.wanted_segments or theirs.wanted_segments
        mine.reason = mine.reason or theirs.reason
        theirs.merged_into = mine

    def fail(self, reason: str) -> None:
        """The values are wanted whole; the first reason is kept."""
        root = self.root()
        root.reason = root.reason or reason


@dataclass(frozen=True)
class Factor:
    """Part of a dim: a length, and the cut along it."""

    length: int
    cut: Cut | None = None
    segments: tuple[int, ...] = ()  # lengths of what is cut by itself; empty: the whole


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def plain(shape: Iterable[int]) -> Layout:
    """The layout of a value that no cut runs through."""
    return tuple((Factor(length),) if length != 1 else () for length in shape)


def length_of(dim: Dim) -> int:
    return math.prod(factor.length for factor in dim)


def cuts_of(layout: Iterable[Dim]) -> list[Cut]:
    return [factor.cut for dim in layout for factor in dim if factor.cut is not None]


def regroup(layout: Layout, shape: Sequence[int], size: int) -> Layout | str:
    """The layout after a view as `shape`, or why a cut does not survive it."""
    rest = [factor for dim in layout for factor in dim if factor.length != 1]
    result: list[Dim] = []
    for length in shape:
        dim: list[Factor] = []
        missing = length
        while missing > 1:
            if not rest:
                return "a view of another number of elements"
            first = rest.pop(0)
            common = math.gcd(first.length, missing)
            if common != first.length:
                if common != missing:
                    return "a view that does not follow the borders of heads"
                halves = split_factor(first, common, size)
                if isinstance(halves, str):
                    return halves
                first = halves[0]
                rest.insert(0, halves[1])
            dim.append(first)
            missing //= first.length
        result.append(tuple(dim))
    return "a view of another number of elements" if rest else tuple(result)


def split_factor(factor: Factor, outer: int, size: int) -> tuple[Factor, Factor] | str:
    """A factor as two, the first of length `outer`, or why its cut does not allow it."""
    inner = factor.length // outer
    if factor.cut is None:
        return Factor(outer), Factor(inner)
    if factor.segments:
        if factor.segments != (inner,) * outer:
            return f"a split into {outer}, of segments of {factor.segments}"
        return Factor(outer), Factor(inner, factor.cut)
    if outer % size == 0:
        return Factor(outer, factor.cut), Factor(inner)
    factor.cut.root().wanted_segments = (inner,) * outer
    return f"a split into {outer} parts, which {size} ranks do not divide"


def common_factors(dims: Sequence[Dim], size: int) -> list[Dim] | str:
    """The same dim of several values, split into factors of the same lengths."""
    if len({tuple(factor.length for factor in dim) for dim in dims}) == 1:
        return list(dims)
    marks = sorted({mark for dim in dims for mark in _marks(dim)})
    if any(after % before for before, after in pairwise(marks)):
        return "heads that do not fit each other"
    lengths = [after // before for before, after in pairwise(marks)]
    result = []
    for dim in dims:
        again = regroup((dim,), lengths, size)
        if isinstance(again, str):
            return again
        result.append(tuple(factor for part in again for factor in part))
    return result


def _marks(dim: Dim) -> list[int]:
    marks = [1]
    for factor in dim:
        marks.append(marks[-1] * factor.length)
    return marks
