"""What every schedule keeps, whatever its times: each action once, on its rank, after what made it there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    COMPUTES,
    FORWARD,
    RECEIVE_BACKWARD,
    RECEIVE_FORWARD,
    RECEIVES,
    REDUCE_GRADIENTS,
    SEND_FORWARD,
    SENDS,
    Action,
    ScheduleError,
    flat,
)

_Sent = tuple[str, int, int]  # RECV_F or RECV_B, receiving stage, microbatch


def check(ranks: Sequence[Sequence[Action]], placement: Sequence[int]) -> None:
    """Raises ScheduleError for the first rule that the lists break; `placement` has each stage's rank."""
    num_microbatches = _check_places(ranks, placement)
    for stage, rank in enumerate(placement):
        _check_stage(ranks[rank], stage, rank, num_microbatches)
    if any(action.kind in (*SENDS, *RECEIVES) for actions in ranks for action in actions):
        _check_messages(ranks, placement, num_microbatches)


def _check_places(ranks: Sequence[Sequence[Action]], placement: Sequence[int]) -> int:
    if not placement or not all(0 <= rank < len(ranks) for rank in placement):
        raise _error(f"{len(placement)} stages are placed on {len(ranks)} ranks as {list(placement)}")
    last = -1
    for rank, actions in enumerate(ranks):
        for action in flat(actions):
            if action.stage >= len(placement) or placement[action.stage] != rank:
                raise _error(f"rank {rank} has the action {action}, whose stage is not there")
            if action.microbatch is not None:
                last = max(last, action.microbatch)
    if last < 0:
        raise _error("no action has a microbatch")
    return last + 1


def _check_stage(actions: Sequence[Action], stage: int, rank: int, num_microbatches: int) -> None:
    """One forward, then one backward, whole or in halves, of each microbatch; then the reduction, if any."""
    place = _places(actions, stage, rank)
    reduced_at = place.pop((REDUCE_GRADIENTS, None), None)
    for microbatch in range(num_microbatches):
        found = [kind for kind in COMPUTES if (kind, microbatch) in place]
        if found not in ([FORWARD, BACKWARD], [FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT]):
            raise _error(f"stage {stage} has {found} of microbatch {microbatch}, not F and B, or F, I and W")
        for earlier, later in pairwise(found):
            if place[earlier, microbatch] > place[later, microbatch]:
                raise _error(
                    f"rank {rank} has {stage}{later}{microbatch} before {stage}{earlier}{microbatch}"
                )
    if reduced_at is not None and reduced_at < max(place.values()):
        raise _error(f"rank {rank} reduces the gradients of stage {stage} before the last of them is there")


def _places(actions: Sequence[Action], stage: int, rank: int) -> dict[tuple[str, int | None], int]:
    """Where the stage's compute actions and its reduction are."""
    place: dict[tuple[str, int | None], int] = {}
    for position, action in enumerate(flat(actions)):
        if action.stage == stage and action.kind in (*COMPUTES, REDUCE_GRADIENTS):
            if (action.kind, action.microbatch) in place:
                raise _error(f"rank {rank} has {action} twice")
            place[action.kind, action.microbatch] = position
    return place


def _check_messages(
    ranks: Sequence[Sequence[Action]], placement: Sequence[int], num_microbatches: int
) -> None:
    """Every message between ranks is sent and received once, and in the same order at both ends of a link."""
    sent: dict[tuple[int, int], list[_Sent]] = {}
    received: dict[tuple[int, int], list[_Sent]] = {}
    for rank, actions in enumerate(ranks):
        for message, other in _messages(actions, placement, SENDS):
            sent.setdefault((rank, other), []).append(message)
        for message, other in _messages(actions, placement, RECEIVES):
            received.setdefault((other, rank), []).append(message)
    expected = Counter(
        (kind, stage, microbatch)
        for stage, rank in enumerate(placement)
        for kind, source in ((RECEIVE_FORWARD, stage - 1), (RECEIVE_BACKWARD, stage + 1))
        if 0 <= source < len(placement) and placement[source] != rank
        for microbatch in range(num_microbatches)
    )
    for verb, lists in (("sent", sent), ("received", received)):
        counted = Counter(message for messages in lists.values() for message in messages)
        for message in sorted(set((expected - counted) + (counted - expected))):
            times = f"{counted[message]} times instead of {expected[message]}"
            raise _error(f"the message of {_name(message)} is {verb} {times}")
    for link, messages in sent.items():
        for a, b in zip(messages, received[link], strict=True):
            if a != b:
                raise _error(
                    f"rank {link[1]} receives {_name(b)} where rank {link[0]} sends that of {_name(a)}"
                )


def _messages(
    actions: Sequence[Action], placement: Sequence[int], kinds: tuple[str, ...]
) -> Iterator[tuple[_Sent, int]]:
    """Each message, named after its receive, and the rank at the other end."""
    for action in actions:
        if action.kind not in kinds:
            continue
        assert action.microbatch is not None
        step = 1 if action.kind in (SEND_FORWARD, RECEIVE_BACKWARD) else -1
        other = action.stage + step
        if not 0 <= other < len(placement):
            raise _error(f"{action} has no stage at its other end")
        if action.kind in RECEIVES:
            yield (action.kind, action.stage, action.microbatch), placement[other]
        else:
            kind = RECEIVE_FORWARD if action.kind == SEND_FORWARD else RECEIVE_BACKWARD
            yield (kind, other, action.microbatch), placement[other]


def _name(message: _Sent) -> str:
    kind, stage, microbatch = message
    return f"{stage}{kind}{microbatch}"


def _error(problem: str) -> ScheduleError:
    return ScheduleError(
        f"A pipeline schedule in which {problem}.",
        "Every stage runs a forward and then a backward of every microbatch once, on its own rank.",
        "Correct the list, or take one of mls.pipeline.schedules.SCHEDULES.",
    )
