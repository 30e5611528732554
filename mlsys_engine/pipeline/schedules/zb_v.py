"""ZB-V: two stages a rank, placed in a V, without a bubble when F, I and W take the same time.

Qi et al. 2023, https://arxiv.org/abs/2401.10241, section 6; its memory is that of 1F1B. The loss is on the
first rank, so its backward starts where the forward ended, without a message.
"""

from __future__ import annotations

from mlsys_engine.pipeline.actions import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, Action
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.schedules.emitter import Emitter, two_stages_a_rank

_WHOLE = (BACKWARD_INPUT, BACKWARD_WEIGHT)


def zb_v(stages: int, microbatches: int, ranks: int | None) -> Schedule:
    """See the module; `ranks` is half the number of stages."""
    placement = two_stages_a_rank("zb-v", stages, ranks)
    num_ranks = stages // 2
    # The pattern needs 2p - 1 microbatches; with fewer, those that do not exist are left out of it.
    needed = max(microbatches, 2 * num_ranks - 1)
    lists = []
    for rank in range(num_ranks):
        actions = _one_rank(rank, num_ranks, needed)
        real = (a for a in actions if a.microbatch is not None and a.microbatch < microbatches)
        lists.append(tuple(real))
    return Schedule(name="zb-v", ranks=tuple(lists), placement=placement)


def _one_rank(rank: int, num_ranks: int, microbatches: int) -> list[Action]:
    emitter = Emitter()
    down, up = rank, 2 * num_ranks - 1 - rank  # the two stages
    # Warm-up: fill the way down; then every second action is a forward on the way up.
    emitter.add(down, *[FORWARD] * (2 * (num_ranks - rank) - 1))
    for _ in range(rank):
        emitter.add(up, FORWARD)
        emitter.add(down, FORWARD)
    for _ in range(num_ranks - rank):
        emitter.add(up, FORWARD, *_WHOLE)
    # Steady: one forward and one backward of each stage in turn, until every forward has run.
    while emitter.count(up, FORWARD) < microbatches:
        if emitter.count(down, FORWARD) < microbatches:
            emitter.add(down, FORWARD)
        emitter.add(down, *_WHOLE)
        emitter.add(up, FORWARD, *_WHOLE)
    # End: inputs' gradients first, so that the other ranks can go on; weights fill what is left.
    for _ in range(rank):
        emitter.add(down, BACKWARD_INPUT)
        emitter.add(up, BACKWARD_INPUT)
    for _ in range(num_ranks - rank):
        emitter.add(down, *_WHOLE)
    for stage in (up, down):
        emitter.add(stage, *[BACKWARD_WEIGHT] * (microbatches - emitter.count(stage, BACKWARD_WEIGHT)))
    return emitter.actions
