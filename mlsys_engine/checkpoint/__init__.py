"""Checkpoints: atomic, hashed, keyed by parameter name, loaded without running code from the file.

Reading and writing are imported when they are first used: torch.distributed.checkpoint, on which they stand,
takes 0.7 s to import, which every rank and every command would pay.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlsys_engine.checkpoint.contents import Contents
from mlsys_engine.checkpoint.folder import (
    DEFAULT_KEEP_LAST,
    final_name,
    latest,
    list_checkpoints,
    set_aside,
    step_of,
)
from mlsys_engine.checkpoint.marker import Marker, read_marker, verify

if TYPE_CHECKING:
    from mlsys_engine.checkpoint.reading import Loaded, load, verify_together
    from mlsys_engine.checkpoint.writing import save

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

_ON_FIRST_USE = {"Loaded": "reading", "load": "reading", "verify_together": "reading", "save": "writing"}


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ON_FIRST_USE[name]}"), name)
