"""Stopping at a step boundary that all ranks agree on: for signals and for callbacks.

A launcher signals its ranks one after the other, or only one of them, so a rank that simply stopped would
leave the others waiting in a collective. Each rank therefore notes its own request, and one int32 is max-
reduced per step. The reduction is started at one boundary and read at the next, where it has long finished
behind the step's own work: it costs a queue entry, not a wait, and a request takes effect one step later.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

# The values that are max-reduced: a signal outranks a callback's wish.
NO_STOP = 0
STOP_BY_CALLBACK = 1
_SIGNAL_BASE = 100

# SIGUSR1 is what Open MPI's mpirun passes on to its ranks (after SIGTERM they have a quarter of a second),
# what Slurm's --signal is used with. It is watched only where the program has no use for it itself.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A terminal's Ctrl-C reaches a rank twice, from the terminal and from its launcher: within this time the two
# are one request.
_SAME_REQUEST_S = 1.0


class TrainingInterrupted(SystemExit):
    """Raised by `fit` on every rank after a signal, when the checkpoint is complete and the record closed.

    As a SystemExit it ends the process without a traceback, with status 128 + the signal's number (143 for
    SIGTERM, 130 for SIGINT). Catch it to do something else; `result` is what `fit` would have returned.
    """

    def __init__(self, signal_number: int, step: int, checkpoint: Path | None, result: Any) -> None:
        super().__init__(128 + signal_number)
        self.signal_number, self.step, self.checkpoint, self.result = signal_number, step, checkpoint, result

    def __str__(self) -> str:
        saved = f"saved in {self.checkpoint}" if self.checkpoint else "without a checkpoint"
        return f"stopped by {signal.Signals(self.signal_number).name} after step {self.step}, {saved}"


class Control:
    """What callbacks get to steer the training."""

    def __init__(self) -> None:
        self.request = NO_STOP

    def stop(self) -> None:
        """Ends the training on all ranks at a step boundary soon (the next but one); `fit` then returns."""
        self.request = max(self.request, STOP_BY_CALLBACK)


class SignalWatch:
    """While entered, turns the first SIGTERM, SIGINT or SIGUSR1 into a request of `control`.

    A second signal kills. The handlers that were there before are restored on leaving. Outside the main
    thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._former: dict[int, Any] = {}
        self._first_at: float | None = None

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == signal.SIGUSR1 and signal.getsignal(number) != signal.SIG_DFL:
                    continue
                self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            # None means that a handler was installed from C, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self._control.request = max(self._control.request, _SIGNAL_BASE + number)
        elif now - self._first_at > _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def signal_of(verdict: int) -> int | None:
    """The signal number in an agreed verdict, None when no signal caused it."""
    return verdict - _SIGNAL_BASE if verdict >= _SIGNAL_BASE else None


class Agreement:
    """All ranks' requests, reduced once a step."""

    def __init__(self, control: Control, world_size: int) -> None:
        self._control = control
        self._distributed = world_size > 1
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None

    def at_boundary(self) -> int:
        """Called by every rank after every step: the verdict on the requests up to the boundary before.

        A world of one reads its own request as late as any other, so that stopping does not depend on its
        size.
        """
        verdict = self._finish_pending()
        self._flag.fill_(self._control.request)
        if self._distributed:
            self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return verdict

    def final(self) -> int:
        """Called by every rank after the last step: the verdict on everything up to now."""
        return max(self.at_boundary(), self._finish_pending())

    def _finish_pending(self) -> int:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._flag.item())
