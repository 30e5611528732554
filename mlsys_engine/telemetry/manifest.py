"""The whole of what a manifest says about where a run ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlsys_engine.telemetry.git_state import code_version
from mlsys_engine.telemetry.hardware import describe_hardware, describe_threads

_RELEVANT = re.compile(
    r"^(OMP|MKL|KMP|GOMP|OPENBLAS|MLSYS|NCCL|GLOO|TORCH|PYTORCH|CUDA|CUBLAS|NVIDIA|OMPI_COMM_WORLD|PMI|PMIX|MPI)_"
    r"|^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|PYTHONHASHSEED|LD_PRELOAD)$"
    r"|^SLURM_(JOB_ID|JOB_NUM_NODES|NTASKS|PROCID|LOCALID|STEP_TASKS_PER_NODE|CPUS_PER_TASK|CPU_BIND_TYPE)$"
    r"|^(ATEN_CPU_CAPABILITY|MALLOC_ARENA_MAX|MALLOC_CONF|SOURCE_DATE_EPOCH)$"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CRED|AUTH|COOKIE|SIGNATURE|SESSION", re.IGNORECASE)


def environment(start: Path | None = None) -> dict[str, Any]:
    """`code`, `environment`, `hardware` and `threads` of this process; called once when a run starts.

    `code["diff"]` holds the text of uncommitted changes, which the tracker keeps as a file of its own.
    """
    return {
        "code": code_version(start),
        "environment": {
            "python": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "packages": _packages(),
            "variables": relevant_variables(os.environ),
            "command": list(sys.argv),
        },
        "hardware": describe_hardware(),
        "threads": describe_threads(),
    }


def relevant_variables(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how a run behaves; never one whose name speaks of a secret."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if _RELEVANT.search(name) and not _SECRET.search(name)
    }


def _packages() -> dict[str, str]:
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"] if distribution.metadata else None
        if name:
            found[name] = distribution.version
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))
