"""What a run ran on: code version, environment, hardware and threads, as plain nested dictionaries."""

from mlsys_engine.telemetry.git_state import code_version
from mlsys_engine.telemetry.hardware import describe_gpus, describe_hardware
from mlsys_engine.telemetry.manifest import environment

__all__ = ["code_version", "describe_gpus", "describe_hardware", "environment"]
