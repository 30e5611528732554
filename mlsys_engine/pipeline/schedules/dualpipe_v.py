"""DualPipe-V: two stages a rank, placed in a V; a forward overlaps the messages of another's backward.

DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437 (DualPipe), and its halved form. Pairs (OVERLAP_F_B) are
where a mixture of experts hides its all-to-all; without any overlap they are a forward and then a backward.
"""

from __future__ import annotations

from collections import deque

from mlsys_engine.pipeline.actions import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    Action,
    ScheduleError,
)
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.schedules.emitter import Emitter, two_stages_a_rank


def dualpipe_v(stages: int, microbatches: int, ranks: int | None) -> Schedule:
    """See the module; `ranks` is half the number of stages, and there are as many microbatches as stages."""
    placement = two_stages_a_rank("dualpipe-v", stages, ranks)
    if microbatches < stages:
        raise ScheduleError(
            f"Schedule 'dualpipe-v' with {stages} stages and {microbatches} microbatches.",
            "It needs as many microbatches as stages.",
            f"Set microbatches to {stages} or more, or take zb-v.",
        )
    lists = tuple(tuple(_one_rank(rank, stages // 2, microbatches)) for rank in range(stages // 2))
    return Schedule(name="dualpipe-v", ranks=lists, placement=placement)


class _Late(Emitter):
    """An emitter that remembers whose weight gradients are still to come."""

    def __init__(self) -> None:
        super().__init__()
        self._late: deque[int] = deque()

    def backward(self, stage: int, *, split: bool) -> None:
        """The next backward of a stage, or only the input's half of it."""
        self.add(stage, BACKWARD_INPUT if split else BACKWARD)
        if split:
            self._late.append(stage)

    def weight(self) -> None:
        """The weight gradient that has waited longest, if any."""
        if self._late:
            self.add(self._late.popleft(), BACKWARD_WEIGHT)


def _one_rank(rank: int, num_ranks: int, microbatches: int) -> list[Action]:
    emitter = _Late()
    down, up = rank, 2 * num_ranks - 1 - rank  # the two stages
    after = num_ranks - 1 - rank  # ranks between this one and the turn of the V
    emitter.add(down, *[FORWARD] * (2 * after))
    for _ in range(rank + 1):
        emitter.add(down, FORWARD)
        emitter.add(up, FORWARD)
    for _ in range(after):
        emitter.backward(up, split=True)
        emitter.weight()
        emitter.add(up, FORWARD)
    for turn in range(microbatches - 2 * num_ranks + rank + 1):
        if turn == 0 and after == 0:  # at the turn of the V the first pair would only wait for itself
            emitter.add(down, FORWARD)
            emitter.add(up, BACKWARD)
        else:
            emitter.add_pair(down, up)
        emitter.add_pair(up, down)
    for _ in range(after):
        emitter.add(up, BACKWARD)
        emitter.add_pair(up, down)
    # From the middle of the end on, weight gradients are late, so that inputs' gradients leave earlier.
    half, odd = (rank + 1) // 2, rank % 2 == 1
    for turn in range(rank + 1):
        emitter.backward(up, split=turn >= half + (not odd))
        emitter.backward(down, split=turn >= half)
    for _ in range(after):
        emitter.weight()
        emitter.backward(down, split=True)
    for _ in range(rank + 1):
        emitter.weight()
    return emitter.actions
