"""A pipeline schedule: for each rank, the list of its actions."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_engine.pipeline import checks, timeline
from mlsys_engine.pipeline.actions import Action, DeadlockError, ScheduleError, flat


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The actions of every rank in their order, and the rank of every stage.

    Construction checks that each stage has one forward and one backward of every microbatch on its own rank,
    in this order, and raises ScheduleError otherwise. Whether ranks wait for each other in a circle is seen
    when it is simulated. Printing it draws a timeline.
    """

    name: str
    ranks: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]  # the rank of each stage

    def __post_init__(self) -> None:
        checks.check(self.ranks, self.placement)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_microbatches(self) -> int:
        return 1 + max(a.microbatch for row in self.ranks for a in flat(row) if a.microbatch is not None)

    def __str__(self) -> str:
        head = (
            f"{self.name}: {self.num_stages} stages on {self.num_ranks} ranks, "
            f"{self.num_microbatches} microbatches"
        )
        try:
            return f"{head}\n{timeline.draw(self.ranks, self.placement)}"
        except DeadlockError as error:
            return f"{head}\n{error}\n{self.to_csv()}"

    def to_csv(self) -> str:
        """A line for each rank, in the format of torch.distributed.pipelining."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(str, row) for row in self.ranks)
        return text.getvalue()

    @classmethod
    def from_csv(cls, text: str, *, name: str = "from csv") -> Schedule:
        """The schedule of such a text, empty cells left out; raises ScheduleError for any other text."""
        rows = [
            tuple(Action.parse(cell) for cell in row if cell.strip()) for row in csv.reader(io.StringIO(text))
        ]
        return from_lists(name, rows)


def from_lists(name: str, ranks: Sequence[Sequence[Action]]) -> Schedule:
    """The schedule of these lists, where a stage is on the rank that has its actions."""
    place = {action.stage: rank for rank, row in enumerate(ranks) for action in flat(row)}
    if sorted(place) != list(range(len(place))):
        raise ScheduleError(
            f"Actions of the stages {sorted(place)}.",
            "Stages are numbered from 0, and none is left out.",
            "Give the actions of every stage.",
        )
    placement = tuple(place[stage] for stage in range(len(place)))
    return Schedule(name=name, ranks=tuple(map(tuple, ranks)), placement=placement)
