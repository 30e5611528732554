"""Pipeline parallelism: schedules as values, their simulator, a search, and the split into stages."""

from mlsys_engine.pipeline import schedules, split
from mlsys_engine.pipeline.actions import Action, DeadlockError, ScheduleError
from mlsys_engine.pipeline.costs import PipelineCosts, StageCosts
from mlsys_engine.pipeline.lowering import with_messages, with_reductions
from mlsys_engine.pipeline.schedule import Schedule
from mlsys_engine.pipeline.search import search
from mlsys_engine.pipeline.simulate import Simulation, simulate

__all__ = [
    "Action",
    "DeadlockError",
    "PipelineCosts",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "StageCosts",
    "schedules",
    "search",
    "simulate",
    "split",
    "with_messages",
    "with_reductions",
]
