"""Where a model is cut into stages: contiguous runs of units whose slowest is as fast as can be.

Units are in the order of execution. A unit outside the repeated blocks (a norm, a head) goes with the block
before it, and those before the first block with the first. The cut is exact, the least largest sum over all
cuts, by a dynamic programme over (groups, stages); among equal ones the first stages are the smaller, as they
hold the most microbatches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

from mlsys_engine.errors import ConfigError, did_you_mean


def balanced(
    units: Sequence[str], blocks: Collection[str], costs: Mapping[str, float], stages: int
) -> dict[str, int]:
    """The stage of each unit; `costs` has any measure of a unit's time, 0 where it says nothing.

    Raises ConfigError for more stages than blocks.
    """
    groups: list[list[str]] = []
    seen_block = False
    for unit in units:
        is_block = unit in blocks
        if not groups or (is_block and seen_block):
            groups.append([])
        seen_block = seen_block or is_block
        groups[-1].append(unit)
    if len(groups) < stages:
        raise ConfigError(
            f"A pipeline of {stages} stages for a model with {len(groups)} blocks.",
            "Every stage has one block at least; a block is never cut.",
            f"Set stages to {len(groups)} or less.",
        )
    starts = _cut([sum(costs.get(unit, 0.0) for unit in group) for group in groups], stages)
    bounds = [*starts, len(groups)]
    return {
        unit: stage
        for stage in range(stages)
        for group in groups[bounds[stage] : bounds[stage + 1]]
        for unit in group
    }


def given(units: Sequence[str], starts: Sequence[str]) -> dict[str, int]:
    """The stage of each unit when these units begin a stage each; the first stage begins by itself.

    Raises ConfigError for names that are no units, and for another order than that of execution.
    """
    for name in starts:
        if name not in units:
            raise ConfigError(
                f"split has {name!r}.",
                f"A stage begins at a block, or at another module of this model: {', '.join(units[:4])}, ...",
                did_you_mean(name, units),
            )
    places = [units.index(name) for name in starts]
    if sorted(set(places)) != places or 0 in places:
        raise ConfigError(
            f"split={list(starts)}.",
            "It names the units that begin the second stage and those after it, each once, in the order in "
            f"which they run: {', '.join(units[:4])}, ...",
            "Leave out the first unit, which begins the first stage, and sort the others.",
        )
    return {unit: sum(place <= index for place in places) for index, unit in enumerate(units)}


def _cut(costs: Sequence[float], stages: int) -> list[int]:
    """Where each stage begins."""
    total = [0.0, *accumulate(costs)]
    count = len(costs)
    # best[k][i]: the least largest stage when groups i.. make k stages; stages at the end take more.
    best = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    begin = [[count] * (count + 1) for _ in range(stages + 1)]
    best[0][count] = 0.0
    for k in range(1, stages + 1):
        for first in range(count - k, -1, -1):
            for stop in range(first + 1, count - k + 2):
                largest = max(total[stop] - total[first], best[k - 1][stop])
                if largest < best[k][first]:
                    best[k][first], begin[k][first] = largest, stop
    starts = [0]
    for k in range(stages, 1, -1):
        starts.append(begin[k][starts[-1]])
    return starts
