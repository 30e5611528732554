"""Where tensors live and how much they take: flat arenas and the meter of saved activations."""

from mlsys_engine.memory.flat_arena import ALIGNMENT_BYTES, Allocate, FlatArena, Slot, layout_slots
from mlsys_engine.memory.meter import SavedActivationMeter, current_observer

__all__ = [
    "ALIGNMENT_BYTES",
    "Allocate",
    "FlatArena",
    "SavedActivationMeter",
    "Slot",
    "current_observer",
    "layout_slots",
]
