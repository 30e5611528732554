"""Offload: activations leave the device between forward and backward, and come back one block ahead.

A GPU's go to pinned host memory, the CPU's to a file.
"""

from mlsys_engine.activation.offload.base import OffloadError, OffloadOptions
from mlsys_engine.activation.offload.lane import Kept
from mlsys_engine.activation.offload.offloader import Bandwidth, Offloader, measure_bandwidth

__all__ = ["Bandwidth", "Kept", "OffloadError", "OffloadOptions", "Offloader", "measure_bandwidth"]
