"""Joining a job that a launcher started, and starting ranks on this machine."""

from mlsys_engine.comm.launch.environment import Placement, detect, launched
from mlsys_engine.comm.launch.join import current_world, init
from mlsys_engine.comm.launch.local import launch_local
from mlsys_engine.comm.launch.world import World

__all__ = ["Placement", "World", "current_world", "detect", "init", "launch_local", "launched"]
