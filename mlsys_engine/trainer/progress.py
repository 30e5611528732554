"""What a person sees of a training on rank 0: a bar on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY_S = 5.0


class ProgressView(Protocol):
    """Shows a running training."""

    def show_step(self, step: int, loss: float, tokens_per_s: float, eta_s: float) -> None: ...

    def message(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None: ...


class Silent:
    """The view of all ranks but the first."""

    def show_step(self, step: int, loss: float, tokens_per_s: float, eta_s: float) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A progress bar, for terminals."""

    def __init__(self, console: Console, first_step: int, total_steps: int) -> None:
        self._progress = RichProgress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
            transient=False,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=first_step, figures="")
        self._progress.start()

    def show_step(self, step: int, loss: float, tokens_per_s: float, eta_s: float) -> None:
        self._progress.update(self._task, completed=step, figures=_figures(loss, tokens_per_s, eta_s))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


class Lines:
    """A line for the first and last step and every few seconds, for log files and pipes."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console, self._total_steps = console, total_steps
        self._next_line = 0.0

    def show_step(self, step: int, loss: float, tokens_per_s: float, eta_s: float) -> None:
        now = time.monotonic()
        if now >= self._next_line or step == self._total_steps:
            self._next_line = now + _LINE_EVERY_S
            self.message(f"step {step}/{self._total_steps}  {_figures(loss, tokens_per_s, eta_s)}")

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None: ...


def open_view(rank: int, first_step: int, total_steps: int) -> ProgressView:
    """The right view for this rank and this stderr."""
    if rank != 0:
        return Silent()
    console = Console(stderr=True)
    if console.is_terminal:
        return Bar(console, first_step, total_steps)
    return Lines(console, total_steps)


def _figures(loss: float, tokens_per_s: float, eta_s: float) -> str:
    return f"loss {loss:.4f}  {_compact(tokens_per_s)} tokens/s  ETA {_duration(eta_s)}"


def _compact(number: float) -> str:
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{suffix}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
