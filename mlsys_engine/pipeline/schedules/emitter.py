"""What the named schedules share: counting microbatches, and refusing numbers that do not fit."""

from __future__ import annotations

from collections import Counter

from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    ScheduleError,
    pair,
)

_COUNTED = {BACKWARD: (BACKWARD_INPUT, BACKWARD_WEIGHT)}


class Emitter:
    """The list of one rank while it is written: each action takes the next microbatch of its stage and kind.

    A whole backward counts as both of its halves, so that a list may change from one to the other.
    """

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: Counter[tuple[int, str]] = Counter()

    def count(self, stage: int, kind: str) -> int:
        """How many actions of this kind the stage has had."""
        return self._next[stage, kind]

    def take(self, stage: int, kind: str) -> Action:
        """The next action of the kind, not yet in the list."""
        counted = _COUNTED.get(kind, (kind,))
        action = Action(stage, kind, self._next[stage, counted[0]])
        for each in counted:
            self._next[stage, each] += 1
        return action

    def add(self, stage: int, *kinds: str) -> None:
        """Appends the next action of each kind."""
        self.actions += [self.take(stage, kind) for kind in kinds]

    def add_pair(self, forward_stage: int, backward_stage: int) -> None:
        """Appends a forward that overlaps a backward."""
        forward = self.take(forward_stage, FORWARD)
        self.actions.append(pair(forward, self.take(backward_stage, BACKWARD)))


def one_stage_a_rank(name: str, stages: int, ranks: int | None) -> tuple[int, ...]:
    """The placement of stages when each has a rank of its own."""
    if ranks not in (None, stages):
        raise ScheduleError(
            f"Schedule {name!r} with {stages} stages on {ranks} ranks.",
            "It has one stage on each rank.",
            f"Set ranks={stages}, or take interleaved-1f1b, zb-v or dualpipe-v.",
        )
    return tuple(range(stages))


def two_stages_a_rank(name: str, stages: int, ranks: int | None) -> tuple[int, ...]:
    """The placement in a V: rank r has the stages r and 2 * ranks - 1 - r."""
    half = stages // 2 if ranks is None else ranks
    if stages != 2 * half:
        raise ScheduleError(
            f"Schedule {name!r} with {stages} stages" + ("." if ranks is None else f" on {ranks} ranks."),
            "It has two stages on each rank.",
            "Set stages to twice the number of ranks.",
        )
    return (*range(half), *reversed(range(half)))
