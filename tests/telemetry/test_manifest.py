from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mlsys_engine.telemetry import describe_gpus, environment
from mlsys_engine.telemetry.manifest import relevant_variables
from mlsys_engine.tracking import json_files


def test_a_manifest_names_code_environment_hardware_and_threads(tmp_path: Path) -> None:
    found = environment(tmp_path)
    assert set(found) == {"code", "environment", "hardware", "threads"}
    assert found["environment"]["python"] == platform.python_version()
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["packages"]["torch"] == torch.__version__
    assert found["hardware"]["cpu"]
    assert found["hardware"]["memory_bytes"] == psutil.virtual_memory().total
    assert found["hardware"]["logical_cores"] >= 1
    assert found["threads"]["torch_threads"] == torch.get_num_threads()
    assert json_files.dumps(found)


def test_secrets_and_unrelated_variables_stay_out() -> None:
    variables = {
        "OMP_NUM_THREADS": "2",
        "MLSYS_JOB_KEY": "00ff",
        "MLSYS_SIMD": "avx2",
        "NCCL_DEBUG": "INFO",
        "RANK": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_ACCOUNT": "someone",
        "TORCH_HUB_TOKEN": "t",
        "CUDA_API_PASSWORD": "p",
        "AWS_SECRET_ACCESS_KEY": "k",
        "HOME": "/root",
    }
    assert relevant_variables(variables) == {
        "MLSYS_SIMD": "avx2",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "2",
        "RANK": "0",
        "SLURM_JOB_ID": "7",
    }


def test_gpus_are_described_by_the_driver_library_when_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    library = SimpleNamespace(
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlSystemGetDriverVersion=lambda: b"550.1",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "H100",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert describe_gpus() == [{"name": "H100", "memory_bytes": 80, "driver": "550.1"}]
    assert calls == ["init", "shutdown"]


def test_a_driver_library_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise OSError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=no_driver))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert describe_gpus() == []
