"""What a run ran on: code version, environment, hardware and threads, as plain nested dictionaries."""

from mlsys_engine.telemetry.code_version import code_version
from mlsys_engine.telemetry.environment import environment
from mlsys_engine.telemetry.hardware import describe_gpus, describe_hardware

__all__ = ["code_version", "describe_gpus", "describe_hardware", "environment"]
