"""Shared fixtures. `run_ranks` and `run_ranks_collecting` start ranks; see tests/support/ranks.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support import ranks

# One thread in the pytest process itself: it starts no thread pool, and numbers do not depend on the machine.
torch.set_num_threads(1)


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
