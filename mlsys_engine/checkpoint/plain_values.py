"""Which values a checkpoint can hold: those that load without running code from the file."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch


def loads_safely(value: Any) -> bool:
    """Whether `value` comes back through a checkpoint, which holds tensors and plain Python values only."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return False
    return True
