"""Adds what a schedule of compute actions leaves open: sends, receives and gradient reductions."""

from __future__ import annotations

from dataclasses import replace

from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    COMPUTES,
    FORWARD,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    REDUCE_GRADIENTS,
    SEND_BACKWARD,
    SEND_FORWARD,
    Action,
    flat,
)
from mlsys_engine.pipeline.costs import PipelineCosts
from mlsys_engine.pipeline.replay import Replay, has_messages, receiver
from mlsys_engine.pipeline.schedule import Schedule

_Ranks = list[list[Action]]


def with_reductions(schedule: Schedule) -> Schedule:
    """The schedule with a REDUCE_GRAD of each stage directly after its last weight gradient."""
    ranks: _Ranks = []
    for row in schedule.ranks:
        left = {part.stage: 0 for part in flat(row)}
        for part in flat(row):
            left[part.stage] += part.kind in (BACKWARD, BACKWARD_WEIGHT)
        rest = [action for action in row if action.kind != REDUCE_GRADIENTS]
        ranks.append([])
        for action in rest:
            ranks[-1].append(action)
            for part in action.parts or (action,):
                if part.kind in (BACKWARD, BACKWARD_WEIGHT):
                    left[part.stage] -= 1
                    if not left[part.stage]:
                        ranks[-1].append(Action(part.stage, REDUCE_GRADIENTS))
    return replace(schedule, ranks=tuple(map(tuple, ranks)))


def with_messages(schedule: Schedule) -> Schedule:
    """The schedule with sends and receives between ranks; as it is when it has some.

    An output is sent directly after the action that makes it. A receive is posted one action before the one
    that reads the message, so that it can arrive meanwhile, or earlier where the order of the sender asks for
    it: both ends of a link have the same order, as links without tags need it. Raises DeadlockError for
    a schedule that deadlocks.
    """
    if has_messages(schedule.ranks):
        return schedule
    places = [{part: i for i, a in enumerate(row) for part in (a.parts or (a,))} for row in schedule.ranks]
    before: list[dict[int, list[Action]]] = [{} for _ in schedule.ranks]
    after: list[dict[int, list[Action]]] = [{} for _ in schedule.ranks]
    links: dict[tuple[int, int], list[tuple[int, Action]]] = {}
    # The replay only proves that the lists can run; the order on a link is the order of its sender.
    Replay(schedule.ranks, schedule.placement, PipelineCosts.even(schedule.num_stages))
    for rank, row in enumerate(schedule.ranks):
        for position, action in enumerate(row):
            for part in action.parts or (action,):
                message = _message(part, schedule)
                if message is None:
                    continue
                send, receive, reader = message
                target = schedule.placement[receive.stage]
                after[rank].setdefault(position, []).append(send)
                reads_at = next(places[target][a] for a in reader if a in places[target])
                links.setdefault((rank, target), []).append((reads_at, receive))
    for (_, target), messages in links.items():
        for position, receive in _posted(messages):
            before[target].setdefault(position, []).append(receive)
    ranks: _Ranks = [
        [
            each
            for position, action in enumerate(row)
            for each in (*before[rank].get(position, ()), action, *after[rank].get(position, ()))
        ]
        for rank, row in enumerate(schedule.ranks)
    ]
    return replace(schedule, ranks=tuple(map(tuple, ranks)))


def _posted(messages: list[tuple[int, Action]]) -> list[tuple[int, Action]]:
    """Where each receive of a link goes, given where it is read: never after that of a later message."""
    at = max(reads_at for reads_at, _ in messages)
    places = []
    for reads_at, receive in reversed(messages):
        at = min(at, max(0, reads_at - 1))
        places.append((at, receive))
    return places[::-1]


def _message(part: Action, schedule: Schedule) -> tuple[Action, Action, tuple[Action, ...]] | None:
    """The send and the receive of what a compute action makes for another rank, and who may read it there."""
    if part.kind not in COMPUTES or part.kind == BACKWARD_WEIGHT:
        return None
    forward = part.kind == FORWARD
    target = receiver(FORWARD if forward else BACKWARD, part.stage)
    if not 0 <= target < schedule.num_stages:
        return None
    if schedule.placement[target] == schedule.placement[part.stage]:
        return None
    readers = tuple(
        Action(target, kind, part.microbatch)
        for kind in ((FORWARD,) if forward else (BACKWARD, BACKWARD_INPUT))
    )
    send = Action(part.stage, SEND_FORWARD if forward else SEND_BACKWARD, part.microbatch)
    return send, Action(target, RECEIVE_FORWARD if forward else RECEIVE_BACKWARD, part.microbatch), readers
