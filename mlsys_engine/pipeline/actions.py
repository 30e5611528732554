"""Actions: what one rank of a pipeline does next, as values that print and parse.

The grammar is the one of torch.distributed.pipelining, so schedules can be exchanged as CSV: stage, kind,
microbatch, as in `2F0`, `1SEND_F3`, `0REDUCE_GRAD`; two that run together print as `(0F4;7B0)OVERLAP_F_B`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mlsys_engine.errors import ConfigError

FORWARD = "F"
BACKWARD = "B"  # input and weight gradients at once
BACKWARD_INPUT = "I"
BACKWARD_WEIGHT = "W"
OVERLAP = "OVERLAP_F_B"
SEND_FORWARD, RECEIVE_FORWARD = "SEND_F", "RECV_F"  # of the sending and of the receiving stage
SEND_BACKWARD, RECEIVE_BACKWARD = "SEND_B", "RECV_B"
REDUCE_GRADIENTS = "REDUCE_GRAD"

COMPUTES = (FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT)
SENDS = (SEND_FORWARD, SEND_BACKWARD)
RECEIVES = (RECEIVE_FORWARD, RECEIVE_BACKWARD)
KINDS = (*COMPUTES, *SENDS, *RECEIVES, REDUCE_GRADIENTS, OVERLAP)
_SINGLE = re.compile(rf"(\d+)({'|'.join(sorted(set(KINDS) - {OVERLAP}, key=len, reverse=True))})(\d*)")
_PAIR = re.compile(rf"\((.+)\){OVERLAP}")


class ScheduleError(ConfigError):
    """A schedule that cannot run, or a text that is none."""


class DeadlockError(ScheduleError):
    """A schedule whose ranks wait for each other; `waiting` has each rank's next action and its reason."""

    def __init__(self, given: str, waiting: dict[int, tuple[Action, str]]) -> None:
        self._what, self.waiting = given, waiting
        lines = "; ".join(f"rank {rank} at {action} {reason}" for rank, (action, reason) in waiting.items())
        super().__init__(
            f"{given}: {lines}.",
            "Every action must come after what it needs, on its own rank and on the others.",
            "Reorder the actions that wait, or take a named schedule.",
        )

    def __reduce__(self) -> tuple[type, tuple[str, dict]]:  # type: ignore[override]
        return type(self), (self._what, self.waiting)


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one rank; an overlapping pair has its two actions in `parts`."""

    stage: int  # -1 for a pair
    kind: str  # one of KINDS
    microbatch: int | None = None  # None for REDUCE_GRAD and for a pair
    parts: tuple[Action, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == OVERLAP:
            kinds = tuple(part.kind for part in self.parts)
            fits = kinds == (FORWARD, BACKWARD) and self.stage == -1 and self.microbatch is None
        else:
            has_microbatch = self.microbatch is not None and self.microbatch >= 0
            fits = self.kind in KINDS and self.stage >= 0 and not self.parts
            fits = fits and (has_microbatch if self.kind != REDUCE_GRADIENTS else self.microbatch is None)
        if not fits:
            raise ScheduleError(
                f"An action of kind {self.kind!r} with stage {self.stage}, microbatch {self.microbatch} and "
                f"{len(self.parts)} parts.",
                f"Kinds are {', '.join(KINDS)}; REDUCE_GRAD has no microbatch, a pair has a forward and a "
                "backward as parts, all others have a stage and a microbatch.",
                "Make it with Action.parse, as in Action.parse('2F0').",
            )

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`; raises ScheduleError for any other text."""
        text = text.strip()
        if pair := _PAIR.fullmatch(text):
            return cls(-1, OVERLAP, None, tuple(cls.parse(part) for part in pair[1].split(";")))
        if match := _SINGLE.fullmatch(text):
            stage, kind, microbatch = match.groups()
            return cls(int(stage), kind, int(microbatch) if microbatch else None)
        raise ScheduleError(
            f"{text!r} was given as an action of a pipeline schedule.",
            "An action is a stage, a kind and a microbatch, such as 2F0, 1I2, 1W2, 2B0 or 1SEND_F3.",
            f"Write one of the kinds {', '.join(KINDS)} between two whole numbers.",
        )


def pair(forward: Action, backward: Action) -> Action:
    """A forward of one microbatch that runs together with the backward of another."""
    return Action(-1, OVERLAP, None, (forward, backward))


def flat(actions: Iterable[Action]) -> Iterator[Action]:
    """The actions with pairs taken apart."""
    for action in actions:
        yield from action.parts or (action,)
