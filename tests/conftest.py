"""Shared fixtures. `run_ranks` and `run_ranks_collecting` start ranks; see tests/support/ranks.py.

With MLSYS_SOAK_SAMPLE=k every soak test runs k of its trials, drawn by MLSYS_SOAK_SEED (0 by default); the
header names it, and the same seed draws the same trials.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import ranks, soak

# One thread in the pytest process itself: it starts no thread pool, and numbers do not depend on the machine.
torch.set_num_threads(1)


def pytest_report_header() -> str | None:
    return soak.header(os.environ)


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out = soak.draw(items, os.environ)
    if left_out:
        items[:] = kept
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    return ranks.run_ranks


@pytest.fixture
def run_ranks_collecting() -> Callable[..., list[ranks.RankOutcome]]:
    return ranks.run_ranks_collecting


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    return ranks.free_port()
