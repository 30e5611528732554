"""Replays action lists against the clock: when does each action run, and who waits for whom.

A rank runs its actions in their order, each as soon as what it needs has arrived. Sends and receives only
post their message: a compute action waits for the message itself. Lists without any are replayed as if every
message left with the end of the action that makes it. Since the order on each rank and so on each link is
fixed, times follow in any order that respects the waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    RECEIVES,
    REDUCE_GRADIENTS,
    SEND_BACKWARD,
    SEND_FORWARD,
    SENDS,
    Action,
    DeadlockError,
    flat,
)
from mlsys_engine.pipeline.costs import PipelineCosts, of

Key = tuple[str, int, int]  # "F" or "B", stage, microbatch: an output, or the gradient of an input
_DIRECTION = {
    SEND_FORWARD: FORWARD,
    SEND_BACKWARD: BACKWARD,
    RECEIVE_FORWARD: FORWARD,
    RECEIVE_BACKWARD: BACKWARD,
}
_RECEIVE = {FORWARD: RECEIVE_FORWARD, BACKWARD: RECEIVE_BACKWARD}


class TimedAction(NamedTuple):
    """An action and when it ran."""

    rank: int
    action: Action
    start_s: float
    end_s: float


class Arrival(NamedTuple):
    """A message at its receiver: there from `time_s` until the action that reads it starts."""

    rank: int
    num_bytes: float
    time_s: float


def has_messages(ranks: Sequence[Sequence[Action]]) -> bool:
    """Whether the lists say themselves what is sent and received."""
    return any(action.kind in SENDS or action.kind in RECEIVES for actions in ranks for action in actions)


class Replay:
    """All actions with their times, and the messages; raises DeadlockError when ranks wait for each other."""

    def __init__(
        self, ranks: Sequence[Sequence[Action]], placement: Sequence[int], costs: PipelineCosts
    ) -> None:
        self._ranks, self._placement, self._costs = ranks, placement, costs
        self._explicit = has_messages(ranks)
        self._last = len(placement) - 1
        self._clock = [0.0] * len(ranks)
        self._reduced = [0.0] * len(ranks)  # end of each rank's last reduction
        self._link: dict[tuple[int, int], float] = {}
        self._outputs: dict[Key, float] = {}  # when they were made
        self._inputs_done: set[tuple[int, int]] = set()  # of which an I has run and W may
        self._posted: set[Key] = set()
        self.arrivals: dict[Key, Arrival] = {}
        self.steps: list[TimedAction] = []
        self._run()

    @property
    def makespan_s(self) -> float:
        return max((*self._clock, *self._reduced))

    def _run(self) -> None:
        heads = [0] * len(self._ranks)
        moving = True
        while moving:
            moving = False
            for rank, actions in enumerate(self._ranks):
                while heads[rank] < len(actions):
                    ready_s = self._ready(rank, actions[heads[rank]])
                    if ready_s is None:
                        break
                    self._execute(rank, actions[heads[rank]], ready_s)
                    heads[rank] += 1
                    moving = True
        waiting = {
            rank: (actions[head], self._reason(rank, actions[head]))
            for rank, (actions, head) in enumerate(zip(self._ranks, heads, strict=True))
            if head < len(actions)
        }
        if waiting:
            raise DeadlockError(f"A schedule of {len(self._ranks)} ranks deadlocks", waiting)

    def _ready(self, rank: int, action: Action) -> float | None:
        """When everything that the action needs is on the rank; None while that is not known."""
        latest = 0.0
        for part in action.parts or (action,):
            for need in self._needs(part):
                time_s = self._available(rank, part.stage, need)
                if time_s is None:
                    return None
                latest = max(latest, time_s)
            if part.kind == BACKWARD_WEIGHT and (part.stage, part.microbatch) not in self._inputs_done:
                return None
        return latest

    def _needs(self, action: Action) -> Iterator[Key]:
        kind, stage, microbatch = action.kind, action.stage, action.microbatch
        if microbatch is None:
            return
        if kind == FORWARD:
            if stage > 0:
                yield FORWARD, stage - 1, microbatch
        elif kind in (BACKWARD, BACKWARD_INPUT):
            yield FORWARD, stage, microbatch
            if stage < self._last:
                yield BACKWARD, stage + 1, microbatch
        elif kind in SENDS:
            yield _DIRECTION[kind], stage, microbatch

    def _available(self, rank: int, stage: int, need: Key) -> float | None:
        direction, source, microbatch = need
        if self._placement[source] == rank:
            return self._outputs.get(need)
        here = (direction, stage, microbatch)
        if here not in self.arrivals or (self._explicit and here not in self._posted):
            return None
        return self.arrivals[here].time_s

    def _execute(self, rank: int, action: Action, ready_s: float) -> None:
        start = max(self._clock[rank], ready_s)
        if action.kind in RECEIVES or action.kind in SENDS:
            end = start if action.kind in SENDS else self._clock[rank]
            assert action.microbatch is not None
            if action.kind in SENDS:
                self._send(_DIRECTION[action.kind], action.stage, action.microbatch, start)
            else:
                self._posted.add((_DIRECTION[action.kind], action.stage, action.microbatch))
        elif action.kind == REDUCE_GRADIENTS:
            start = max(start, self._reduced[rank])
            end = self._reduced[rank] = start + self._costs.seconds(action)
        else:
            end = self._clock[rank] = start + self._costs.seconds(action)
            for part in action.parts or (action,):
                self._finish(part, end)
        self.steps.append(TimedAction(rank, action, start, end))

    def _finish(self, action: Action, end_s: float) -> None:
        microbatch = action.microbatch
        assert microbatch is not None
        if action.kind == BACKWARD_INPUT:
            self._inputs_done.add((action.stage, microbatch))
        if action.kind == BACKWARD_WEIGHT:
            return
        direction = FORWARD if action.kind == FORWARD else BACKWARD
        self._outputs[direction, action.stage, microbatch] = end_s
        target = receiver(direction, action.stage)
        if self._explicit or not 0 <= target <= self._last:
            return
        if self._placement[target] != self._placement[action.stage]:
            self._send(direction, action.stage, microbatch, end_s)

    def _send(self, direction: str, stage: int, microbatch: int, now_s: float) -> None:
        target = receiver(direction, stage)
        link = self._placement[stage], self._placement[target]
        num_bytes = of(self._costs.stages[min(stage, target)].output_bytes, microbatch)
        left_s = max(now_s, self._link.get(link, 0.0)) + self._costs.message_s(num_bytes)
        self._link[link] = left_s
        self.arrivals[direction, target, microbatch] = Arrival(
            link[1], num_bytes, left_s + self._costs.latency_s
        )

    def _reason(self, rank: int, action: Action) -> str:
        """What the action waits for, in words."""
        for part in flat((action,)):
            if part.kind == BACKWARD_WEIGHT:
                return f"waits for {part.stage}{BACKWARD_INPUT}{part.microbatch}, which is not before it"
            for direction, source, microbatch in self._needs(part):
                if self._available(rank, part.stage, (direction, source, microbatch)) is not None:
                    continue
                name = f"{source}{direction}{microbatch}"
                if self._placement[source] == rank:
                    return f"waits for {name}, which is not before it"
                here = (direction, part.stage, microbatch)
                if self._explicit and here not in self._posted:
                    return f"waits for {part.stage}{_RECEIVE[direction]}{microbatch}, which is not before it"
                return f"waits for {name} of rank {self._placement[source]}"
        return "waits"


def receiver(direction: str, stage: int) -> int:
    """The stage that gets what `stage` made: the next for outputs, the one before for gradients."""
    return stage + 1 if direction == FORWARD else stage - 1
