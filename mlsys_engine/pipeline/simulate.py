"""Simulates a schedule: how long it takes, where it waits, and what it holds in memory."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    COMPUTES,
    FORWARD,
    OVERLAP,
    Action,
)
from mlsys_engine.pipeline.costs import PipelineCosts, of
from mlsys_engine.pipeline.replay import Replay, TimedAction
from mlsys_engine.pipeline.schedule import Schedule

_COMPUTES = (*COMPUTES, OVERLAP)
_Event = tuple[float, int, float]  # time, order at the same time, bytes taken or given back


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What a schedule takes. Lists have a value for each rank."""

    makespan_s: float  # from the first action to the end of the last, reductions included
    busy_s: tuple[float, ...]  # computing
    peak_bytes: tuple[int, ...]  # of activations and of messages that wait to be read
    steps: tuple[TimedAction, ...]

    @property
    def bubble_shares(self) -> tuple[float, ...]:
        """The share of the makespan in which each rank does not compute."""
        return tuple(1 - busy / self.makespan_s if self.makespan_s else 0.0 for busy in self.busy_s)

    @property
    def bubble_share(self) -> float:
        """The same over all ranks."""
        return sum(self.bubble_shares) / len(self.busy_s)

    def __str__(self) -> str:
        lines = [f"{self.makespan_s:.6g} s, bubbles {self.bubble_share:.1%}"]
        for rank, (share, peak) in enumerate(zip(self.bubble_shares, self.peak_bytes, strict=True)):
            lines.append(f"rank {rank}: bubbles {share:.1%}, peak {peak} bytes")
        return "\n".join(lines)


def simulate(schedule: Schedule, costs: PipelineCosts | None = None) -> Simulation:
    """What the schedule takes at these costs, by default one second for each F, I and W and no bytes.

    Raises DeadlockError, which names each rank's waiting action, when the ranks wait for each other, and
    ConfigError when the costs are of another number of stages or microbatches.
    """
    costs = costs or PipelineCosts.even(schedule.num_stages)
    if len(costs.stages) != schedule.num_stages:
        raise ConfigError(
            f"Costs of {len(costs.stages)} stages for a schedule of {schedule.num_stages}.",
            "Every stage has costs.",
            "Give as many StageCosts as the schedule has stages.",
        )
    replay = Replay(schedule.ranks, schedule.placement, costs)
    busy = [0.0] * schedule.num_ranks
    for step in replay.steps:
        if step.action.kind in _COMPUTES:
            busy[step.rank] += step.end_s - step.start_s
    return Simulation(
        makespan_s=replay.makespan_s,
        busy_s=tuple(busy),
        peak_bytes=peaks(replay, schedule.num_ranks, costs),
        steps=tuple(replay.steps),
    )


def peaks(replay: Replay, num_ranks: int, costs: PipelineCosts) -> tuple[int, ...]:
    """The most bytes each rank holds at once.

    A message counts on its receiver from its arrival to the start of the action that reads it, whose
    activations include it. At one moment, arrivals come first, then the rank's own actions in their order.
    """
    events: list[list[_Event]] = [[] for _ in range(num_ranks)]
    for step in replay.steps:
        if step.action.kind not in _COMPUTES:
            continue
        row = events[step.rank]
        order = 2 * len(row)
        for part in step.action.parts or (step.action,):
            direction = FORWARD if part.kind == FORWARD else BACKWARD
            assert part.microbatch is not None
            key = (direction, part.stage, part.microbatch)
            if part.kind != BACKWARD_WEIGHT and key in replay.arrivals:
                arrival = replay.arrivals[key]
                row.append((arrival.time_s, -1, arrival.num_bytes))
                row.append((step.start_s, order, -arrival.num_bytes))
            taken, given = _bytes(part, costs)
            row.append((step.start_s, order, taken))
            row.append((step.end_s, order + 1, -given))
    return tuple(_peak(row) for row in events)


def _bytes(part: Action, costs: PipelineCosts) -> tuple[float, float]:
    """What the action takes when it starts and gives back when it ends."""
    stage, microbatch = costs.stages[part.stage], part.microbatch
    assert microbatch is not None
    whole, kept = of(stage.activation_bytes, microbatch), of(stage.weight_bytes, microbatch)
    given = {FORWARD: 0.0, BACKWARD: whole, BACKWARD_INPUT: whole - kept, BACKWARD_WEIGHT: kept}
    return (whole if part.kind == FORWARD else 0.0), given[part.kind]


def _peak(events: list[_Event]) -> int:
    held = most = 0.0
    for _, _, change in sorted(events, key=lambda event: event[:2]):
        held += change
        most = max(most, held)
    return round(most)
