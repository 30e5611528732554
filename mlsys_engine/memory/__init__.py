"""Where tensors live and how much they take: flat arenas and the meter of saved activations."""

from mlsys_engine.memory.flat_arena import ALIGNMENT_BYTES, Allocate, FlatArena, Slot, layout_slots
from mlsys_engine.memory.meter import Observe, SavedActivationMeter, current_observer, is_parameter

__all__ = [
    "ALIGNMENT_BYTES",
    "Allocate",
    "FlatArena",
    "Observe",
    "SavedActivationMeter",
    "Slot",
    "current_observer",
    "is_parameter",
    "layout_slots",
]
