"""Writes a schedule for given costs: whenever a rank is free, it runs the best action that is ready.

The rule has a few settings, and none is best for all costs; the search tries them all.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
)
from mlsys_engine.pipeline.costs import PerMicrobatch, PipelineCosts, of
from mlsys_engine.pipeline.replay import receiver

Lists = list[list[Action]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a free rank chooses."""

    split: bool  # the backward into its halves
    backward_first: bool  # or the forward, when both are ready
    most_held: int  # microbatches that a stage may hold, beyond one for itself and each stage after it
    patience: float  # wait for a backward that is nearer than this share of the next action's time


def rules(microbatches: int, costs: PipelineCosts) -> Iterator[Rule]:
    """All settings that are tried; whole backwards only where a stage says what they take."""
    whole = any(stage.backward_s is not None for stage in costs.stages)
    for split in (True, False) if whole else (True,):
        for backward_first in (True, False):
            for most_held in dict.fromkeys((0, 1, 2, microbatches)):
                for patience in (0.0, 0.5):
                    yield Rule(
                        split=split, backward_first=backward_first, most_held=most_held, patience=patience
                    )


def perturbed(costs: PipelineCosts, numbers: random.Random) -> PipelineCosts:
    """Costs whose seconds are off by about a quarter: the rule then decides otherwise, at times better."""

    def off(value: PerMicrobatch) -> PerMicrobatch:
        factor = math.exp(numbers.gauss(0, 0.25))
        return tuple(factor * each for each in value) if isinstance(value, tuple) else factor * value

    return replace(
        costs,
        latency_s=costs.latency_s * math.exp(numbers.gauss(0, 0.25)),
        stages=tuple(
            replace(
                stage,
                forward_s=off(stage.forward_s),
                input_s=off(stage.input_s),
                weight_s=off(stage.weight_s),
            )
            for stage in costs.stages
        ),
    )


def write(
    rule: Rule, placement: Sequence[int], microbatches: int, costs: PipelineCosts, limit_bytes: float
) -> Lists | None:
    """The lists of all ranks under the rule, or None when it runs into the memory limit and cannot go on.

    Microbatches keep their order in every stage, so gradients are summed in the order of one process.
    """
    state = _Writer(rule, placement, microbatches, costs, limit_bytes)
    while state.step():
        pass
    return state.lists if state.finished else None


class _Writer:
    """Per stage: how many actions of each kind have run; per rank: its clock and what it holds."""

    def __init__(
        self,
        rule: Rule,
        placement: Sequence[int],
        microbatches: int,
        costs: PipelineCosts,
        limit_bytes: float,
    ) -> None:
        self._rule, self._costs, self._limit = rule, costs, limit_bytes
        self._placement, self._microbatches = placement, microbatches
        num_ranks = 1 + max(placement)
        self._stages = [[s for s, r in enumerate(placement) if r == rank] for rank in range(num_ranks)]
        self.lists: Lists = [[] for _ in range(num_ranks)]
        self._clock = [0.0] * num_ranks
        self._held = [0.0] * num_ranks
        self._count = [{FORWARD: 0, BACKWARD_INPUT: 0, BACKWARD_WEIGHT: 0} for _ in placement]
        self._ready: dict[tuple[str, int, int], float] = {
            (FORWARD, 0, microbatch): 0.0 for microbatch in range(microbatches)
        }  # when a stage's next forward or backward has its input
        self._link: dict[tuple[int, int], float] = {}
        self._choices: list[tuple[float, Action] | None] = [None] * num_ranks
        self._changed = set(range(num_ranks))  # ranks whose choice may be another now
        backward = BACKWARD_INPUT if rule.split else BACKWARD
        self._order = (backward, FORWARD) if rule.backward_first else (FORWARD, backward)

    @property
    def finished(self) -> bool:
        return all(count[BACKWARD_WEIGHT] == self._microbatches for count in self._count)

    def step(self) -> bool:
        """Runs one action, of the rank that can start first; False when none can."""
        for rank in self._changed:
            self._choices[rank] = self._choose(rank)
        self._changed.clear()
        started = [(choice[0], rank) for rank, choice in enumerate(self._choices) if choice]
        if not started:
            return False
        start_s, rank = min(started)
        choice = self._choices[rank]
        assert choice is not None
        self._changed.add(rank)
        self._run(rank, choice[1], start_s)
        return True

    def _choose(self, rank: int) -> tuple[float, Action] | None:
        """The rank's next action and when it starts."""
        clock = self._clock[rank]
        options = [(max(clock, ready_s), place, action) for ready_s, place, action in self._options(rank)]
        weight = self._weight(rank)
        if not options:
            return (clock, weight) if weight else None
        earliest = min(start for start, _, _ in options)
        if weight and earliest > clock:
            # A weight gradient fills the bubble, unless the wait is too short to be worth being late.
            wait = earliest - clock
            if wait > self._rule.patience * self._costs.seconds(weight):
                return clock, weight
        start, _, action = min((o for o in options if o[0] <= earliest), key=lambda option: option[:2])
        if action.kind == FORWARD and self._rule.backward_first:
            latest = start + self._rule.patience * self._costs.seconds(action)
            for later, _, other in sorted(options, key=lambda option: option[:2]):
                if other.kind != FORWARD and later < latest:
                    return later, other
        return start, action

    def _options(self, rank: int) -> Iterator[tuple[float, tuple[int, int], Action]]:
        """Forwards and backwards whose input has a known time: that time, their order, themselves."""
        for stage in self._stages[rank]:
            count = self._count[stage]
            for position, kind in enumerate(self._order):
                counted = FORWARD if kind == FORWARD else BACKWARD_INPUT
                microbatch = count[counted]
                ready_s = self._ready.get((counted, stage, microbatch))
                if ready_s is None or (kind == FORWARD and not self._may_hold(rank, stage, microbatch)):
                    continue
                # Of two stages, a backward is more urgent in the earlier one, a forward in the later one.
                among = stage if kind != FORWARD else -stage
                yield ready_s, (position, among), Action(stage, kind, microbatch)

    def _may_hold(self, rank: int, stage: int, microbatch: int) -> bool:
        count = self._count[stage]
        most = len(self._placement) - stage + self._rule.most_held
        needed = of(self._costs.stages[stage].activation_bytes, microbatch)
        fits = self._held[rank] + needed <= self._limit
        return fits and count[FORWARD] - count[BACKWARD_INPUT] < most

    def _weight(self, rank: int) -> Action | None:
        """The weight gradient that has waited longest: of the earliest microbatch, of the last stage."""
        waiting = [
            (count[BACKWARD_WEIGHT], -stage)
            for stage in self._stages[rank]
            if (count := self._count[stage])[BACKWARD_WEIGHT] < count[BACKWARD_INPUT]
        ]
        if not waiting:
            return None
        microbatch, negative = min(waiting)
        return Action(-negative, BACKWARD_WEIGHT, microbatch)

    def _run(self, rank: int, action: Action, start_s: float) -> None:
        stage, kind, microbatch = action.stage, action.kind, action.microbatch
        assert microbatch is not None
        self.lists[rank].append(action)
        end = self._clock[rank] = start_s + self._costs.seconds(action)
        cost, count = self._costs.stages[stage], self._count[stage]
        whole, kept = of(cost.activation_bytes, microbatch), of(cost.weight_bytes, microbatch)
        if kind == FORWARD:
            count[FORWARD] += 1
            self._held[rank] += whole
            self._pass_on(FORWARD, stage, microbatch, end)
            return
        if kind in (BACKWARD, BACKWARD_INPUT):
            count[BACKWARD_INPUT] += 1
            self._held[rank] -= whole - kept
            self._pass_on(BACKWARD_INPUT, stage, microbatch, end)
        if kind in (BACKWARD, BACKWARD_WEIGHT):
            count[BACKWARD_WEIGHT] += 1
            self._held[rank] -= kept

    def _pass_on(self, kind: str, stage: int, microbatch: int, end_s: float) -> None:
        target = receiver(FORWARD if kind == FORWARD else BACKWARD, stage)
        if target == len(self._placement):  # the loss: its gradient is there at once
            self._ready[BACKWARD_INPUT, stage, microbatch] = end_s
        elif target >= 0:
            ready_s = end_s
            link = self._placement[stage], self._placement[target]
            if link[0] != link[1]:
                num_bytes = of(self._costs.stages[min(stage, target)].output_bytes, microbatch)
                left_s = max(end_s, self._link.get(link, -math.inf)) + self._costs.message_s(num_bytes)
                self._link[link] = left_s
                ready_s = left_s + self._costs.latency_s
            self._ready[kind, target, microbatch] = ready_s
            self._changed.add(link[1])
