"""Searches a schedule for measured, uneven stage times under a memory limit.

It starts from every named schedule and from those that a greedy rule writes for the costs, and for costs that
are slightly off, and improves the best by moving single actions. So it is never slower, in the simulator,
than the best named one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlsys_engine.pipeline import greedy
from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    DeadlockError,
    ScheduleError,
)
from mlsys_engine.pipeline.costs import PipelineCosts
from mlsys_engine.pipeline.replay import Replay
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.schedules import SCHEDULES, build
from mlsys_engine.pipeline.simulate import peaks

_Lists = tuple[tuple[Action, ...], ...]


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    makespan_s: float
    name: str
    lists: _Lists
    placement: tuple[int, ...]


def search(
    costs: PipelineCosts,
    *,
    microbatches: int,
    ranks: int | None = None,
    memory_limit_bytes: float = math.inf,
    tries: int = 60,
    moves: int = 200,
    seed: int = 0,
) -> Schedule:
    """The fastest schedule found for these costs in which no rank holds more than the limit.

    `ranks` is the number of stages unless given. With two stages a rank, loops and Vs are both tried. `tries`
    is how often the greedy rule is given slightly wrong costs, `moves` how often an action of the best
    schedule is moved; equal arguments give an equal schedule. Raises ScheduleError when nothing fits
    the limit, with the smallest peak that was seen, and for numbers that do not fit together.
    """
    num_ranks = len(costs.stages) if ranks is None else ranks
    if num_ranks < 1 or microbatches < 1 or len(costs.stages) % num_ranks:
        raise ScheduleError(
            f"A search for {len(costs.stages)} stages, {num_ranks} ranks and {microbatches} microbatches.",
            "Every rank has the same number of stages, and there is a microbatch.",
            "Set ranks to a divisor of the number of stages.",
        )
    judge = _Judge(costs, num_ranks, memory_limit_bytes)
    numbers = random.Random(seed)
    for schedule in _named(len(costs.stages), microbatches, num_ranks):
        judge.look_at(schedule.name, schedule.ranks, schedule.placement)
    for placement in _placements(len(costs.stages), num_ranks):
        judge.look_at("one at a time", _one_at_a_time(placement, microbatches), placement)
        rules = list(greedy.rules(microbatches, costs))
        wrong = [(numbers.choice(rules), greedy.perturbed(costs, numbers)) for _ in range(tries)]
        for rule, believed in (*((rule, costs) for rule in rules), *wrong):
            lists = greedy.write(rule, placement, microbatches, believed, memory_limit_bytes)
            if lists:
                judge.look_at("searched", [_merged(row, costs) for row in lists], placement)
    if judge.best is None:
        raise ScheduleError(
            f"A search under memory_limit_bytes={memory_limit_bytes:.0f}.",
            f"The smallest peak of the schedules that were tried is {judge.smallest_peak} bytes.",
            "Raise the limit, checkpoint activations, or use more or smaller microbatches.",
        )
    _improve(judge, moves, numbers)
    best = judge.best
    return Schedule(name=best.name, ranks=best.lists, placement=best.placement)


class _Judge:
    """Keeps the best of what it has seen."""

    def __init__(self, costs: PipelineCosts, num_ranks: int, limit_bytes: float) -> None:
        self._costs, self._num_ranks, self._limit = costs, num_ranks, limit_bytes
        self.best: _Candidate | None = None
        self.smallest_peak: int | None = None

    def look_at(self, name: str, lists: Sequence[Sequence[Action]], placement: tuple[int, ...]) -> bool:
        """Whether the lists are the best so far, or as fast as the best."""
        try:
            replay = Replay(lists, placement, self._costs)
        except DeadlockError:
            return False
        makespan = replay.makespan_s
        if self.best and makespan > self.best.makespan_s:
            return False
        peak = max(peaks(replay, self._num_ranks, self._costs))
        if self.smallest_peak is None or peak < self.smallest_peak:
            self.smallest_peak = peak
        if peak > self._limit:
            return False
        self.best = _Candidate(
            makespan_s=makespan, name=name, lists=tuple(map(tuple, lists)), placement=placement
        )
        return True


def _named(stages: int, microbatches: int, ranks: int) -> Iterator[Schedule]:
    for name in SCHEDULES:
        try:
            yield build(name, stages=stages, microbatches=microbatches, ranks=ranks)
        except ScheduleError:  # not for these numbers
            continue


def _one_at_a_time(placement: tuple[int, ...], microbatches: int) -> list[list[Action]]:
    """No pipeline at all: the least memory that a step can take without smaller microbatches."""
    rows: list[list[Action]] = [[] for _ in range(1 + max(placement))]
    stages = range(len(placement))
    for microbatch in range(microbatches):
        for kind, order in ((FORWARD, stages), (BACKWARD, reversed(stages))):
            for stage in order:
                rows[placement[stage]].append(Action(stage, kind, microbatch))
    return rows


def _placements(stages: int, ranks: int) -> Iterator[tuple[int, ...]]:
    yield tuple(stage % ranks for stage in range(stages))
    if stages == 2 * ranks and ranks > 1:
        yield (*range(ranks), *reversed(range(ranks)))


def _merged(row: Sequence[Action], costs: PipelineCosts) -> list[Action]:
    """The row with a W directly after its I as one B, where that is no slower."""
    merged: list[Action] = []
    for action in row:
        last = merged[-1] if merged else None
        halves = last and last.kind == BACKWARD_INPUT and action.kind == BACKWARD_WEIGHT
        if last and halves and (last.stage, last.microbatch) == (action.stage, action.microbatch):
            whole = Action(action.stage, BACKWARD, action.microbatch)
            if costs.seconds(whole) <= costs.seconds(last) + costs.seconds(action):
                merged[-1] = whole
                continue
        merged.append(action)
    return merged


def _improve(judge: _Judge, moves: int, numbers: random.Random) -> None:
    """Moves one action of one rank past a few others, as long as that is not worse."""
    for _ in range(moves):
        best = judge.best
        assert best is not None
        rank = numbers.randrange(len(best.lists))
        row = list(best.lists[rank])
        if len(row) < 2:
            continue
        source = numbers.randrange(len(row))
        target = max(0, min(len(row) - 1, source + numbers.choice((-3, -2, -1, 1, 2, 3))))
        action = row[source]
        passed = row[target:source] if target < source else row[source + 1 : target + 1]
        if any(_same_order(action, other) for other in passed):
            continue
        row.insert(target, row.pop(source))
        judge.look_at("searched", [*best.lists[:rank], row, *best.lists[rank + 1 :]], best.placement)


def _same_order(action: Action, other: Action) -> bool:
    """Whether two actions of a rank must keep their order: of one microbatch or kind in one stage."""
    mine, theirs = action.parts or (action,), other.parts or (other,)
    return any(
        a.stage == b.stage
        and (a.microbatch == b.microbatch or a.kind == b.kind or {a.kind, b.kind} <= _BACKWARDS)
        for a in mine
        for b in theirs
    )


_BACKWARDS = {BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT}
