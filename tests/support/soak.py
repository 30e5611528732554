"""Draws the trials of soak tests that a run takes: all of them, or MLSYS_SOAK_SAMPLE of each test."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

SAMPLE = "MLSYS_SOAK_SAMPLE"
SEED = "MLSYS_SOAK_SEED"


def header(variables: Mapping[str, str]) -> str | None:
    """The line of pytest's header that says how to repeat the draw; None when nothing is drawn."""
    if not variables.get(SAMPLE):
        return None
    return f"soak: {int(variables[SAMPLE])} trials of each test, drawn by {SEED}={_seed(variables)}"


def draw(items: Sequence[Any], variables: Mapping[str, str]) -> tuple[list[Any], list[Any]]:
    """Pytest's items as (kept, left out), in their order; one test's draw does not depend on another's."""
    if not variables.get(SAMPLE):
        return list(items), []
    trials = defaultdict(list)
    for item in items:
        if item.get_closest_marker("soak"):
            trials[item.nodeid.partition("[")[0]].append(item.nodeid)
    left_out = set()
    for test, names in trials.items():
        sample = random.Random(f"{_seed(variables)} {test}").sample(
            names, min(int(variables[SAMPLE]), len(names))
        )
        left_out |= set(names) - set(sample)
    return (
        [item for item in items if item.nodeid not in left_out],
        [item for item in items if item.nodeid in left_out],
    )


def _seed(variables: Mapping[str, str]) -> int:
    return int(variables.get(SEED) or 0)
