"""What a forward in parts refuses, and where in the model's code that is."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from mlsys_engine.errors import ConfigError

_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)


class PartialForwardError(ConfigError):
    """The model's forward cannot be computed in parts as it is, or not with these stages."""


def refusal(given: str, expected: str, action: str) -> PartialForwardError:
    """The error for what the model's own code does at this moment; names the module, the file and "
    "the line."""
    return PartialForwardError(f"{place()}: {given}", expected, action)


def place() -> str:
    """The innermost line of the model's own code that is being run: `GPT2Model.forward, model.py:12`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OURS, _TORCH, "<")):
        frame = frame.f_back
    code, owner = frame.f_code, frame.f_locals.get("self")
    prefix = f"{type(owner).__name__}." if isinstance(owner, nn.Module) else ""
    return f"{prefix}{code.co_name}, {code.co_filename}:{frame.f_lineno}"
