"""What `init` decides for one rank."""

from __future__ import annotations

import pytest
import torch

from mlsys_engine.comm.launch.join import device_of


def test_ranks_compute_on_the_cpu_of_a_host_with_gpus_and_rank_0_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(rank) for rank in (0, 1)] == [torch.device("cpu")] * 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 GPUs" in said and "not part of this version" in said


def test_a_host_without_gpus_is_not_worth_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(0) == torch.device("cpu")
    assert capsys.readouterr().err == ""
