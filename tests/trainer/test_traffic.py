"""A training moves its gradients through the native backend, as its counters say; gloo is out of reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mlsys_engine import comm
from tests.support.no_gloo import GlooWasAsked
from tests.trainer.workloads import make_loader, make_trainer

STEPS = 5


def _train(rank: int, world_size: int, run_dir: str) -> tuple[comm.Counters, int]:
    with pytest.raises(GlooWasAsked):
        torch.distributed.new_group(backend="gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4096), nn.Tanh(), nn.Linear(4096, 1))
    make_trainer(run_dir, model=model).fit(make_loader(), max_steps=STEPS)
    return comm.counters(), sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_move_through_shared_memory_in_place(
    tmp_path: Path, run_ranks: Any, world_size: int
) -> None:
    counted = run_ranks(_train, world_size, str(tmp_path))
    # Each sum reads what all but one rank have, and writes to all but one. Which rank does how much of it
    # depends on who has time.
    moved = sum(counters.shm_bytes for counters, _ in counted)
    assert moved >= STEPS * counted[0][1] * 2 * (world_size - 1)
    for counters, _ in counted:
        assert counters.zero_copy_operations >= STEPS
        assert counters.tcp_bytes_sent == counters.tcp_bytes_received == 0


def test_gradients_move_over_tcp_between_hosts(tmp_path: Path, run_ranks: Any) -> None:
    for counters, gradient_bytes in run_ranks(_train, 2, str(tmp_path), env={"MLSYS_LOCALITY": "0,1"}):
        # A ring of two: half of the buffer leaves in the reduce-scatter, half in the all-gather.
        assert counters.tcp_bytes_sent >= STEPS * gradient_bytes
        assert counters.tcp_bytes_received >= STEPS * gradient_bytes
        assert counters.shm_bytes == 0
