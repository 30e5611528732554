"""What `init` decides for one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mlsys_engine.comm.launch.join import device_of
from mlsys_engine.errors import LaunchError


def _device(rank: int = 0, *, world_size: int = 2, **env: str) -> torch.device:
    return device_of(env, rank=rank, local_rank=rank, world_size=world_size)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A host that seems to have two GPUs and NCCL; the device that was made the current one is noted."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    return chosen


def test_ranks_compute_on_the_cpu_of_a_host_with_gpus_and_rank_0_says_so(
    two_gpus: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert [_device(rank) for rank in (0, 1)] == [torch.device("cpu")] * 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 GPUs" in said and "MLSYS_DEVICE=cuda" in said
    assert _device(MLSYS_DEVICE="cpu") == torch.device("cpu")
    assert capsys.readouterr().err == ""
    assert two_gpus == []


def test_a_host_without_gpus_is_not_worth_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device() == torch.device("cpu")
    assert capsys.readouterr().err == ""


def test_ranks_that_ask_for_cuda_take_the_gpu_of_their_local_rank(two_gpus: list[int]) -> None:
    assert _device(1, MLSYS_DEVICE="cuda") == torch.device("cuda", 1)
    assert two_gpus == [1]
    with pytest.raises(LaunchError, match="local rank 2 sees 2 usable GPUs"):
        _device(2, MLSYS_DEVICE="cuda")


def test_ranks_that_ask_for_cuda_need_nccl_unless_alone(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(LaunchError, match="does not have NCCL"):
        _device(MLSYS_DEVICE="cuda")
    assert _device(world_size=1, MLSYS_DEVICE="cuda") == torch.device("cuda", 0)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(LaunchError, match="'gpu'"):
        _device(MLSYS_DEVICE="gpu")
