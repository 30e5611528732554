"""Runs one rank's action list: computes, passes messages on, says when a stage's gradients are complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlsys_engine.errors import DataError
from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    REDUCE_GRADIENTS,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    flat,
)
from mlsys_engine.pipeline.runtime.links import Expected, Links
from mlsys_engine.pipeline.runtime.packing import Layout, Message, layout_of
from mlsys_engine.pipeline.runtime.stage import Stage

Place = tuple[int, int]  # stage, microbatch


@dataclass(kw_only=True)
class Job:
    """What the actions of one run work on."""

    call: Callable[[int], Any]  # the whole model's forward of a microbatch, seeded
    signatures: Sequence[Any]  # of each microbatch: what the shapes of its messages depend on
    on_output: Callable[[int, Any], None] = lambda microbatch, output: None  # of the last stage
    loss_of: Callable[[Any], Any] | None = None  # what backward begins with; None: there is none
    on_reduce: Callable[[int], None] = lambda stage: None
    lap: Callable[[str], None] = lambda phase: None
    split: frozenset[Place] = frozenset()  # microbatches of stages whose backward comes in halves


@dataclass
class _Mail:
    """Messages of one run that are on their way on this rank."""

    expected: dict[tuple[str, int, int], tuple[int, Expected]] = field(default_factory=dict)
    arrived: dict[tuple[str, int, int], Message] = field(default_factory=dict)  # from this very rank
    leaving: dict[tuple[str, int, int], tuple[Message, Layout]] = field(default_factory=dict)


class Executor:
    """One rank's stages and its links. A run that raises leaves nothing behind on this rank."""

    def __init__(self, stages: Mapping[int, Stage], placement: Sequence[int], links: Links) -> None:
        self._stages, self._placement, self._links = stages, placement, links
        self._known: dict[tuple[int, Any], Layout] = {}  # of what crosses into a stage, seen in earlier runs
        self._seen: dict[tuple[int, Any], Layout] = {}  # in this one
        self._mail = _Mail()

    def run(self, actions: Iterable[Action], job: Job) -> None:
        """Runs the actions, which have their messages, to the end."""
        self._mail = _Mail()
        try:
            for action in flat(actions):
                _RUN[action.kind](self, action, job)
            self._links.flush()
        except BaseException:
            self._links.cancel()
            for stage in self._stages.values():
                stage.cancel()
            self._seen = {}
            raise
        self._known |= self._seen
        self._seen = {}

    def _forward(self, action: Action, job: Job) -> None:
        stage, microbatch = _place(action)
        arrived = None if stage == 0 else partial(self._take_forward, stage, microbatch, job)
        output, message = self._stages[stage].forward(
            microbatch,
            partial(job.call, microbatch),
            arrived,
            signature=job.signatures[microbatch],
            split=(stage, microbatch) in job.split,
        )
        job.lap("forward")
        if stage + 1 == len(self._placement):
            job.on_output(microbatch, output)
            if job.loss_of is not None:
                self._stages[stage].set_loss(microbatch, job.loss_of(output))
        else:
            layout = layout_of([t for t in message.tensors if t is not None], message.state)
            self._give(FORWARD, stage + 1, microbatch, message, layout)

    def _backward(self, action: Action, job: Job) -> None:
        stage, microbatch = _place(action)
        is_last = stage + 1 == len(self._placement)
        arrived = None if is_last else self._take(BACKWARD, stage, microbatch)
        message, layout = self._stages[stage].backward(microbatch, arrived)
        job.lap("backward")
        if stage > 0:
            self._give(BACKWARD, stage - 1, microbatch, message, layout)

    def _weights(self, action: Action, job: Job) -> None:
        stage, microbatch = _place(action)
        self._stages[stage].weights(microbatch)
        job.lap("backward")

    def _reduce(self, action: Action, job: Job) -> None:
        job.on_reduce(action.stage)

    def _receive_forward(self, action: Action, job: Job) -> None:
        stage, microbatch = _place(action)
        known = self._known.get((stage, job.signatures[microbatch]))
        self._expect(FORWARD, stage, microbatch, stage - 1, lambda: known, announced=known is None)

    def _receive_backward(self, action: Action, job: Job) -> None:
        stage, microbatch = _place(action)
        layout = partial(self._stages[stage].gradient_layout, microbatch)
        self._expect(BACKWARD, stage, microbatch, stage + 1, layout, announced=False)

    def _send_forward(self, action: Action, job: Job) -> None:
        stage, microbatch = _place(action)
        message, layout = self._mail.leaving.pop((FORWARD, stage + 1, microbatch))
        key = (stage + 1, job.signatures[microbatch])
        known = self._known.get(key)
        if known is not None and known != layout:
            raise DataError(
                f"What stage {stage} sends for microbatch {microbatch} is {layout.tensors}.",
                f"For a batch of these shapes and values it was {known.tensors} before, and the next stage "
                "is told shapes once.",
                "Keep what depends on the values of a batch inside one block.",
            )
        self._seen[key] = layout
        self._links.send(self._placement[stage + 1], message, layout, announce=known is None)

    def _send_backward(self, action: Action, job: Job) -> None:
        stage, microbatch = _place(action)
        message, layout = self._mail.leaving.pop((BACKWARD, stage - 1, microbatch))
        self._links.send(self._placement[stage - 1], message, layout, announce=False)

    def _expect(
        self,
        kind: str,
        stage: int,
        microbatch: int,
        source: int,
        layout: Callable[[], Layout | None],
        *,
        announced: bool,
    ) -> None:
        rank = self._placement[source]
        expected = self._links.expect(rank, layout, announced=announced)
        self._mail.expected[kind, stage, microbatch] = rank, expected

    def _take(self, kind: str, stage: int, microbatch: int) -> Message:
        """What `stage` reads, from this rank or from another."""
        key = (kind, stage, microbatch)
        if key in self._mail.arrived:
            return self._mail.arrived.pop(key)
        rank, expected = self._mail.expected.pop(key)
        return self._links.wait(rank, expected)

    def _take_forward(self, stage: int, microbatch: int, job: Job) -> Message:
        coming = self._mail.expected.get((FORWARD, stage, microbatch))
        message = self._take(FORWARD, stage, microbatch)
        if coming is not None and coming[1].layout is not None:
            self._seen[stage, job.signatures[microbatch]] = coming[1].layout
        return message

    def _give(self, kind: str, stage: int, microbatch: int, message: Message, layout: Layout) -> None:
        """What the neighbour `stage` is to read: kept here when it is on this rank, else until it is sent."""
        source = stage - 1 if kind == FORWARD else stage + 1
        if self._placement[stage] == self._placement[source]:
            self._mail.arrived[kind, stage, microbatch] = message
        else:
            self._mail.leaving[kind, stage, microbatch] = message, layout


def _place(action: Action) -> Place:
    assert action.microbatch is not None
    return action.stage, action.microbatch


_RUN: dict[str, Callable[[Executor, Action, Job], None]] = {
    FORWARD: Executor._forward,
    BACKWARD: Executor._backward,
    BACKWARD_INPUT: Executor._backward,
    BACKWARD_WEIGHT: Executor._weights,
    REDUCE_GRADIENTS: Executor._reduce,
    SEND_FORWARD: Executor._send_forward,
    SEND_BACKWARD: Executor._send_backward,
    RECEIVE_FORWARD: Executor._receive_forward,
    RECEIVE_BACKWARD: Executor._receive_backward,
}
