"""The trackers by name. A new one is one file in trackers/ and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.tracking.base import Tracker

TRACKERS = {"local": "mlsys_engine.tracking.trackers.local:LocalTracker"}


def make_trackers(names: Sequence[str | Tracker], run_dir: Path) -> list[Tracker]:
    """The trackers of one run, in order; a tracker given as an object is taken as it is."""
    if isinstance(names, str):
        names = (names,)
    return [_make(name, run_dir) if isinstance(name, str) else name for name in names]


def check_trackers(names: Sequence[str | Tracker]) -> None:
    """Refuses unknown names without importing or creating a tracker."""
    for name in (names,) if isinstance(names, str) else names:
        if isinstance(name, str) and name not in TRACKERS:
            raise ConfigError(
                f"There is no tracker named {name!r}.",
                f"Trackers are {', '.join(map(repr, TRACKERS))}, or an object with start, log and finish.",
                did_you_mean(name, TRACKERS),
            )


def _make(name: str, run_dir: Path) -> Tracker:
    check_trackers([name])
    module, _, attribute = TRACKERS[name].partition(":")
    tracker: Tracker = getattr(importlib.import_module(module), attribute)(run_dir)
    return tracker
