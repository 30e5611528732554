"""torch.compile around a block: the code that runs a block is left alone, the block itself is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncompiled(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """Marks a function that torch.compile runs as it is, while what it calls is compiled.

    Without the mark it would be traced anew for every block, until torch gives up with a warning.
    torch.compiler.disable imports torch._dynamo (a second) where nobody compiles, and takes the block along.
    """
    set_code_exec_strategy(fn.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return fn
