"""ZB-H1: 1F1B whose weight gradients wait for the bubbles. Qi et al. 2023, https://arxiv.org/abs/2401.10241.

The backward is split: I sends the input's gradient on, W can run at any later time. Rank r is r weight
gradients late, which fills the end of the step; no rank holds more than the first rank of 1F1B does.
With F, I and W of one length each the bubble of p stages is p - 1 instead of 3 (p - 1) such lengths.
"""

from __future__ import annotations

from mlsys_engine.pipeline.actions import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.schedules.emitter import Emitter, one_stage_a_rank


def zb_h1(stages: int, microbatches: int, ranks: int | None) -> Schedule:
    """See the module; `ranks` is the number of stages."""
    placement = one_stage_a_rank("zb-h1", stages, ranks)
    lists = []
    for stage in range(stages):
        rank = Emitter()
        warmup = min(stages - 1 - stage, microbatches)
        rank.add(stage, *[FORWARD] * warmup)
        for done in range(microbatches):
            if rank.count(stage, FORWARD) < microbatches:
                rank.add(stage, FORWARD)
            rank.add(stage, BACKWARD_INPUT)
            if done >= stage:
                rank.add(stage, BACKWARD_WEIGHT)
        rank.add(stage, *[BACKWARD_WEIGHT] * (microbatches - rank.count(stage, BACKWARD_WEIGHT)))
        lists.append(tuple(rank.actions))
    return Schedule(name="zb-h1", ranks=tuple(lists), placement=placement)
