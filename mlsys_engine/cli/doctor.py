"""`mlsys doctor`: what was built and found on this machine, and whether it works."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from mlsys_engine import __version__, telemetry
from mlsys_engine.cli import doctor_hang, selftest
from mlsys_engine.cli.output import Output
from mlsys_engine.errors import NativeBuildError
from mlsys_engine.native import build_info, load_activation, load_comm, load_kernels, load_tensors
from mlsys_engine.telemetry.hardware import describe_threads
from mlsys_engine.tracking import TRACKERS

_MPIRUN_TIMEOUT_S = 10.0
_LOADERS: dict[str, Callable[[], object]] = {
    "kernels": load_kernels,
    "comm": load_comm,
    "tensors": load_tensors,
    "activation": load_activation,
}


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Says what was built and found on this machine, and runs a self-test of a few seconds."""

    self_test: bool = True
    """Start two ranks that all-reduce and take an optimizer step."""
    hang: Path | None = None
    """Explain the dumps that the ranks of a hung job left in this folder, and examine nothing else."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: Sequence[str]) -> int:
    """Prints the findings. Status 1 when something that the engine needs is missing or does not work."""
    options = tyro.cli(DoctorOptions, args=list(arguments), prog="mlsys doctor")
    out = Output(as_json=options.json)
    if options.hang is not None:
        return doctor_hang.explain(options.hang, out)
    findings = examine()
    built = bool(findings["native"]["built"])
    findings["self_test"] = selftest.run_on_two_ranks() if options.self_test and built else None
    out.json(findings)
    _print(out, findings)
    test = findings["self_test"]
    return 0 if built and (test is None or test["passed"]) else 1


def examine() -> dict[str, Any]:
    """Everything but the self-test; loads the extensions, and starts nothing."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": _examine_native(),
        "hardware": telemetry.describe_hardware(),
        "threads": describe_threads(),
        "mpi": _examine_mpi(),
        "trackers": {name: _can_import(target) for name, target in TRACKERS.items()},
    }


def _examine_native() -> dict[str, Any]:
    try:
        info = dataclasses.asdict(build_info())
    except NativeBuildError as error:
        return {"built": False, "error": str(error), "extensions": {}, "simd": None}
    extensions: dict[str, str] = {}
    for name, load in _LOADERS.items():
        try:
            load()
            extensions[name] = "loaded"
        except (NativeBuildError, ImportError, OSError) as error:
            extensions[name] = f"cannot be loaded: {error}"
    works = all(state == "loaded" for state in extensions.values())
    simd = torch.ops.mlsys.simd_level() if extensions["kernels"] == "loaded" else None
    return {"built": works, "build": info, "extensions": extensions, "simd": simd}


def _examine_mpi() -> dict[str, Any]:
    try:
        mpi4py: str | None = importlib.metadata.version("mpi4py")
    except importlib.metadata.PackageNotFoundError:
        mpi4py = None
    mpirun = shutil.which("mpirun")
    return {"mpi4py": mpi4py, "mpirun": mpirun, "version": _version_of(mpirun) if mpirun else None}


def _version_of(mpirun: str) -> str | None:
    try:
        done = subprocess.run(
            [mpirun, "--version"], capture_output=True, text=True, timeout=_MPIRUN_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer: {error}"
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    versions = [line for line in lines if "version" in line.lower() or "open mpi" in line.lower()]
    return next(iter(versions or lines), None)


def _can_import(target: str) -> bool:
    module, _, attribute = target.partition(":")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def _print(out: Output, findings: dict[str, Any]) -> None:
    native, hardware, threads, mpi = (findings[key] for key in ("native", "hardware", "threads", "mpi"))
    memory_gib = hardware["memory_bytes"] / 2**30
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)" for gpu in hardware["gpus"])
    missing = [name for name, found in findings["trackers"].items() if not found]
    rows = [
        (
            "engine",
            f"mlsys_engine {findings['version']}, Python {findings['python']}, torch {findings['torch']}",
        ),
        *_native_rows(native),
        ("processor", f"{hardware['cpu']}, {hardware['logical_cores']} cores, {memory_gib:.0f} GiB"),
        ("GPUs", gpus or "none"),
        ("threads", f"{threads['torch_threads']} in torch; may run on CPUs {_spans(threads['affinity'])}"),
        ("MPI", _mpi_line(mpi)),
        (
            "trackers",
            ", ".join(findings["trackers"]) + (f"; missing: {', '.join(missing)}" if missing else ""),
        ),
    ]
    out.pairs([*rows, *_test_rows(findings["self_test"])])


def _native_rows(native: dict[str, Any]) -> list[tuple[str, str]]:
    if "build" not in native:
        return [("native", f"NOT BUILT. {native['error']}")]
    build = native["build"]
    cuda = "with CUDA kernels" if build["cuda_kernels"] else "without CUDA kernels"
    broken = [f"{name} {state}" for name, state in native["extensions"].items() if state != "loaded"]
    return [
        ("native", f"built {build['built']} for torch {build['torch']}, {cuda}"),
        ("extensions", "; ".join(broken) or f"{', '.join(native['extensions'])} loaded"),
        ("SIMD", f"{native['simd']} (lower it with MLSYS_SIMD)" if native["simd"] else "unknown"),
        ("transports", "shared memory inside a host, TCP between hosts (or MPI: MLSYS_TRANSPORT=mpi)"),
    ]


def _mpi_line(mpi: dict[str, Any]) -> str:
    launcher = (
        f"{mpi['mpirun']}: {mpi['version']}"
        if mpi["mpirun"]
        else "no mpirun on PATH (torchrun does not need it)"
    )
    return f"{launcher}; {'mpi4py ' + mpi['mpi4py'] if mpi['mpi4py'] else 'no mpi4py'}"


def _test_rows(test: dict[str, Any] | None) -> list[tuple[str, str]]:
    if test is None:
        return [("self-test", "not run")]
    if not test["passed"]:
        return [("self-test", f"FAILED: {test['cause']}")]
    return [
        (
            "self-test",
            f"passed in {test['seconds']:.1f} s: {test['ranks']} ranks on {test['backend']}, all-reduce of "
            f"{test['all_reduce_bytes']:,} bytes exact, AdamW within {test['optimizer_error']:.0e} of torch",
        )
    ]


def _spans(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    told = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return told or f"all {os.cpu_count()}"
