"""The named schedules, one file each."""

from mlsys_engine.pipeline.schedules.registry import SCHEDULES, build

__all__ = ["SCHEDULES", "build"]
