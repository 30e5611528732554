"""Draws action lists as text: a line for each rank, a column for each unit of time."""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_engine.pipeline.actions import COMPUTES, Action, flat
from mlsys_engine.pipeline.costs import PipelineCosts
from mlsys_engine.pipeline.replay import Replay

_MOST_COLUMNS = 400


def draw(ranks: Sequence[Sequence[Action]], placement: Sequence[int]) -> str:
    """The compute actions at unit times (F, I and W take 1, B takes 2); a dot is a bubble.

    Stages are left out of the names when every rank has one. Raises DeadlockError when the lists deadlock.
    """
    costs = PipelineCosts.even(len(placement))
    steps = Replay(ranks, placement, costs).steps
    one_stage_each = len(placement) == len(ranks)
    cells: list[dict[int, str]] = [{} for _ in ranks]
    for step in steps:
        column = round(step.start_s)
        for part in flat((step.action,)):
            if part.kind not in COMPUTES:
                continue
            length = round(costs.seconds(part))
            cells[step.rank][column] = f"{part.kind}{part.microbatch}" if one_stage_each else str(part)
            for later in range(column + 1, column + length):
                cells[step.rank][later] = "-"
            column += length
    width = max(len(text) for row in cells for text in row.values())
    columns = 1 + max(column for row in cells for column in row)
    if columns > _MOST_COLUMNS:
        return f"(a drawing of {columns} columns is left out)"
    return "\n".join(
        f"rank {rank}  "
        + " ".join(
            row.get(column, ".").ljust(width, "-" if row.get(column) == "-" else " ")
            for column in range(columns)
        ).rstrip()
        for rank, row in enumerate(cells)
    )
