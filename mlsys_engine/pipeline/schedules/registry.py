"""The table of named schedules. A new one is a file here and a line there."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from mlsys_engine.errors import did_you_mean
from mlsys_engine.pipeline.actions import ScheduleError
from mlsys_engine.pipeline.schedule import Schedule

SCHEDULES = {
    "gpipe": "mlsys_engine.pipeline.schedules.gpipe:gpipe",
    "1f1b": "mlsys_engine.pipeline.schedules.one_f_one_b:one_f_one_b",
    "interleaved-1f1b": "mlsys_engine.pipeline.schedules.interleaved_1f1b:interleaved_1f1b",
    "zb-h1": "mlsys_engine.pipeline.schedules.zb_h1:zb_h1",
    "zb-v": "mlsys_engine.pipeline.schedules.zb_v:zb_v",
    "dualpipe-v": "mlsys_engine.pipeline.schedules.dualpipe_v:dualpipe_v",
}


def build(name: str, *, stages: int, microbatches: int, ranks: int | None = None) -> Schedule:
    """The named schedule of so many stages in all and microbatches of one step.

    Without `ranks`, a schedule with one stage a rank has as many ranks as stages, and the others half as
    many. Raises ScheduleError for a name that is not in the table, and for numbers that it cannot take.
    """
    if name not in SCHEDULES:
        raise ScheduleError(
            f"schedule={name!r}.",
            f"Schedules are {', '.join(SCHEDULES)}.",
            did_you_mean(name, SCHEDULES),
        )
    if min(stages, microbatches, 1 if ranks is None else ranks) < 1:
        raise ScheduleError(
            f"Schedule {name!r} with {stages} stages, {microbatches} microbatches and {ranks} ranks.",
            "There is at least one of each.",
            "Give numbers of 1 or more.",
        )
    module, _, attribute = SCHEDULES[name].partition(":")
    make: Callable[[int, int, int | None], Schedule] = getattr(importlib.import_module(module), attribute)
    return make(stages, microbatches, ranks)
