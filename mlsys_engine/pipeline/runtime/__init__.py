"""Runs schedules: a rank's stages, its messages, halves of a backward, tied gradients."""

from mlsys_engine.pipeline.runtime.accumulation import PipelineAccumulation
from mlsys_engine.pipeline.runtime.outputs import broadcast
from mlsys_engine.pipeline.runtime.planned import PlannedSchedule, build_planned
from mlsys_engine.pipeline.runtime.ties import Tie, chosen, find_ties, stage_of
from mlsys_engine.pipeline.runtime.ties import choices as tied_choices

__all__ = [
    "PipelineAccumulation",
    "PlannedSchedule",
    "Tie",
    "broadcast",
    "build_planned",
    "chosen",
    "find_ties",
    "stage_of",
    "tied_choices",
]
