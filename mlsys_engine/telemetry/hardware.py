"""The machine: processor, memory, GPUs, threads. GPUs are asked through the driver where that is possible."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch


def describe_hardware() -> dict[str, Any]:
    """Processor model and cores, memory in bytes, and the GPUs of this host."""
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": describe_gpus(),
    }


def describe_gpus() -> list[dict[str, Any]]:
    """Name and memory in bytes of each GPU: from NVML when nvidia-ml-py is installed, else from torch."""
    try:
        return _gpus_from_nvml(importlib.import_module("pynvml"))
    except Exception:  # no such module, no driver, no permission: NVML's own errors share no base with ours
        return _gpus_from_torch()


def describe_threads() -> dict[str, Any]:
    """The thread counts that torch uses now, and the cores that this process may run on."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return {
        "torch_threads": torch.get_num_threads(),
        "torch_interop_threads": torch.get_num_interop_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "affinity": allowed,
    }


def _gpus_from_nvml(nvml: Any) -> list[dict[str, Any]]:
    nvml.nvmlInit()
    try:
        driver = _as_text(nvml.nvmlSystemGetDriverVersion())
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [
            {
                "name": _as_text(nvml.nvmlDeviceGetName(handle)),
                "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
                "driver": driver,
            }
            for handle in handles
        ]
    finally:
        nvml.nvmlShutdown()


def _gpus_from_torch() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": one.name, "memory_bytes": int(one.total_memory)} for one in properties]


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in {"model name", "cpu model", "hardware"} and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _as_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
