"""GPipe: all forwards, then all backwards. Huang et al. 2019, https://arxiv.org/abs/1811.06965.

Bubbles are (p - 1) / (m + p - 1) of the time on p even stages with m microbatches; every stage holds the
activations of all m.
"""

from __future__ import annotations

from mlsys_engine.pipeline.actions import BACKWARD, FORWARD, Action
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.schedules.emitter import one_stage_a_rank


def gpipe(stages: int, microbatches: int, ranks: int | None) -> Schedule:
    """See the module; `ranks` is the number of stages."""
    placement = one_stage_a_rank("gpipe", stages, ranks)
    lists = tuple(
        tuple(Action(stage, kind, m) for kind in (FORWARD, BACKWARD) for m in range(microbatches))
        for stage in range(stages)
    )
    return Schedule(name="gpipe", ranks=lists, placement=placement)
