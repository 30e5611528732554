"""Numbers of stages and microbatches that every named schedule is tried with."""

from __future__ import annotations

from mlsys_engine.pipeline import Schedule, ScheduleError
from mlsys_engine.pipeline.schedules import SCHEDULES, build

TWO_STAGES = ("interleaved-1f1b", "zb-v", "dualpipe-v")


def every_schedule() -> list[Schedule]:
    """Each named schedule on 1 to 5 ranks with 1 to 12 microbatches, where it takes them."""
    made = []
    for name in SCHEDULES:
        for ranks in range(1, 6):
            for microbatches in range(1, 13):
                stages = ranks * (2 if name in TWO_STAGES else 1)
                try:
                    made.append(build(name, stages=stages, microbatches=microbatches, ranks=ranks))
                except ScheduleError:
                    continue
    return made
