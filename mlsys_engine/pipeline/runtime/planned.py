"""The schedule of a plan, for as many microbatches as a step has."""

from __future__ import annotations

from dataclasses import replace

from mlsys_engine.errors import DataError
from mlsys_engine.pipeline.actions import BACKWARD_INPUT, Action, ScheduleError, flat
from mlsys_engine.pipeline.lowering import with_messages, with_reductions
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.schedules import SCHEDULES, build

Row = tuple[Action, ...]


class PlannedSchedule:
    """A named schedule, or the CSV text of a given one, on the ranks of a pipeline.

    `pieces` is the number of microbatches that a batch is cut into, `accumulate` the most batches of a step
    that are cut. A step of fewer microbatches leaves out the last; one of more takes the named schedule at
    its size, and raises DataError for a given one.
    """

    def __init__(self, schedule: str, *, stages: int, ranks: int, pieces: int, accumulate: int = 1) -> None:
        self.pieces, self.accumulate = pieces, accumulate
        self._name, self._stages, self._ranks = schedule, stages, ranks
        self._built: dict[int, Schedule] = {}
        self._planned = self._at_size(pieces * accumulate)
        self.placement = self._planned.placement

    def row(self, rank: int, num_microbatches: int) -> tuple[Row, frozenset[tuple[int, int]]]:
        """A rank's actions with messages, and the (stage, microbatch) whose backward comes in halves."""
        if num_microbatches not in self._built:
            self._built[num_microbatches] = with_messages(with_reductions(self._at_size(num_microbatches)))
        row = self._built[num_microbatches].ranks[rank]
        split = frozenset(
            (action.stage, action.microbatch)
            for action in flat(row)
            if action.kind == BACKWARD_INPUT and action.microbatch is not None
        )
        return row, split

    def _at_size(self, num_microbatches: int) -> Schedule:
        return _first(
            build_planned(self._name, self._stages, self._ranks, num_microbatches), num_microbatches
        )


def build_planned(name: str, stages: int, ranks: int, microbatches: int) -> Schedule:
    """The schedule, of at least so many microbatches: of some more where it does not take just as many.

    Raises ScheduleError for stages and ranks that it does not take.
    """
    if name not in SCHEDULES:
        given = Schedule.from_csv(name)
        if given.num_microbatches < microbatches:
            raise DataError(
                f"A step of {microbatches} microbatches.",
                f"The given schedule has {given.num_microbatches}.",
                "Give fewer, or a schedule by its name, which is made for any number.",
            )
        return given
    for size in range(microbatches, microbatches + stages):
        try:
            return build(name, stages=stages, microbatches=size, ranks=ranks)
        except ScheduleError:
            continue
    return build(name, stages=stages, microbatches=microbatches, ranks=ranks)


def _first(schedule: Schedule, num_microbatches: int) -> Schedule:
    """The schedule without the microbatches from `num_microbatches` on, which nothing before waits for."""
    if schedule.num_microbatches <= num_microbatches:
        return schedule
    ranks = tuple(
        tuple(each for action in row for each in _kept(action, num_microbatches)) for row in schedule.ranks
    )
    return replace(schedule, ranks=ranks)


def _kept(action: Action, num_microbatches: int) -> tuple[Action, ...]:
    parts = tuple(
        part
        for part in action.parts or (action,)
        if part.microbatch is None or part.microbatch < num_microbatches
    )
    return (action,) if len(parts) == len(action.parts or (action,)) else parts
