"""1F1B: a backward as soon as there is one. Narayanan et al. 2019 (PipeDream), with a flush after each step.

Bubbles are those of GPipe, but stage s of p holds the activations of p - s microbatches at most.
"""

from __future__ import annotations

from mlsys_engine.pipeline.actions import BACKWARD, FORWARD
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.schedules.emitter import Emitter, one_stage_a_rank


def one_f_one_b(stages: int, microbatches: int, ranks: int | None) -> Schedule:
    """See the module; `ranks` is the number of stages."""
    placement = one_stage_a_rank("1f1b", stages, ranks)
    lists = []
    for stage in range(stages):
        rank = Emitter()
        warmup = min(stages - 1 - stage, microbatches)
        rank.add(stage, *[FORWARD] * warmup)
        rank.add(stage, *[FORWARD, BACKWARD] * (microbatches - warmup))
        rank.add(stage, *[BACKWARD] * warmup)
        lists.append(tuple(rank.actions))
    return Schedule(name="1f1b", ranks=tuple(lists), placement=placement)
