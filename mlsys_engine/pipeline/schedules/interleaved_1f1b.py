"""Interleaved 1F1B: v stages a rank, placed in a loop.

Narayanan et al. 2021, https://arxiv.org/abs/2104.04473. Microbatches go in rounds of about as many as there
are ranks, each through all stages of a rank before the next round starts. The
bubble shrinks by v, for v times the messages and more activations held.
"""

from __future__ import annotations

from mlsys_engine.pipeline.actions import BACKWARD, FORWARD, Action, ScheduleError
from mlsys_engine.pipeline.schedule import Schedule


def interleaved_1f1b(stages: int, microbatches: int, ranks: int | None) -> Schedule:
    """See the module; `ranks` is half the number of stages unless given."""
    num_ranks = max(1, stages // 2) if ranks is None else ranks
    if stages % num_ranks:
        raise ScheduleError(
            f"Schedule 'interleaved-1f1b' with {stages} stages on {num_ranks} ranks.",
            "Every rank has the same number of stages.",
            f"Set stages to a multiple of {num_ranks}.",
        )
    rounds = max(1, microbatches // num_ranks)
    if microbatches % rounds:
        raise ScheduleError(
            f"Schedule 'interleaved-1f1b' with {microbatches} microbatches on {num_ranks} ranks.",
            f"They go in {rounds} rounds of equal length.",
            f"Set microbatches to a multiple of {num_ranks}, or to less than {2 * num_ranks}.",
        )
    length, chunks = microbatches // rounds, stages // num_ranks
    lists = []
    for rank in range(num_ranks):
        own = range(rank, stages, num_ranks)
        starts = range(0, microbatches, length)
        forwards = [Action(s, FORWARD, r + i) for r in starts for s in own for i in range(length)]
        backwards = [Action(s, BACKWARD, r + i) for r in starts for s in reversed(own) for i in range(length)]
        warmup = min((chunks - 1) * length + 2 * (num_ranks - 1 - rank), len(forwards))
        steady = zip(forwards[warmup:], backwards, strict=False)
        order = [*forwards[:warmup], *(action for both in steady for action in both)]
        lists.append((*order, *backwards[len(forwards) - warmup :]))
    placement = tuple(stage % num_ranks for stage in range(stages))
    return Schedule(name="interleaved-1f1b", ranks=tuple(lists), placement=placement)
