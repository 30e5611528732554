"""Checkpoints: atomic, hashed, keyed by parameter name, loaded without running code from the file."""

from mlsys_engine.checkpoint.contents import Contents
from mlsys_engine.checkpoint.folder import final_name, latest, list_checkpoints, set_aside, step_of
from mlsys_engine.checkpoint.marker import Marker, read_marker, verify
from mlsys_engine.checkpoint.reading import Loaded, load, verify_together
from mlsys_engine.checkpoint.writing import DEFAULT_KEEP_LAST, save

__all__ = [
    "DEFAULT_KEEP_LAST",
    "Contents",
    "Loaded",
    "Marker",
    "final_name",
    "latest",
    "list_checkpoints",
    "load",
    "read_marker",
    "save",
    "set_aside",
    "step_of",
    "verify",
    "verify_together",
]
