"""A curve in one line of a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Block characters from the lowest to the highest value, at most `width`; a dot where nothing is finite.

    Longer series are averaged over neighbours.
    """
    cells = [_mean(values[start:stop]) for start, stop in _buckets(len(values), width)]
    finite = [cell for cell in cells if math.isfinite(cell)]
    if not finite:
        return "·" * len(cells)
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        _block((cell - low) / span if span else 0.5) if math.isfinite(cell) else "·" for cell in cells
    )


def _buckets(count: int, width: int) -> list[tuple[int, int]]:
    cells = min(count, width)
    return [(index * count // cells, (index + 1) * count // cells) for index in range(cells)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _block(height: float) -> str:
    return _BLOCKS[min(len(_BLOCKS) - 1, int(height * len(_BLOCKS)))]
