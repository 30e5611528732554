"""Finds, checks and loads the four extensions that setup.py builds. Nothing is loaded on import."""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from mlsys_engine.errors import NativeBuildError
from mlsys_engine.native.source_hash import hash_sources

NATIVE = Path(__file__).resolve().parent
CSRC = NATIVE.parents[1] / "csrc"
BUILD_COMMAND = "python setup.py build_ext --inplace   (or: scripts/build)"


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """What setup.py recorded about the build."""

    torch: str
    torch_cuda: str | None
    cuda_kernels: bool
    source_hash: str
    built: str


@functools.cache
def build_info() -> BuildInfo:
    """The record of the build, checked against this torch and, in a checkout, against the sources."""
    path = NATIVE / "_build.json"
    if not path.exists():
        raise NativeBuildError(
            f"The native extensions are not built: {path} is missing. "
            f"They are compiled once against the installed torch {torch.__version__}. Type: {BUILD_COMMAND}"
        )
    info = BuildInfo(**json.loads(path.read_text()))
    if _minor(info.torch) != _minor(torch.__version__):
        raise NativeBuildError(
            f"The native extensions were built for torch {info.torch}, this is torch {torch.__version__}. "
            f"The process group needs the same minor version. Type: {BUILD_COMMAND}"
        )
    if CSRC.is_dir() and hash_sources(CSRC) != info.source_hash:
        raise NativeBuildError(
            f"The sources in {CSRC} changed after the native extensions were built ({info.built}). "
            f"Running the old code would mislead you. Type: {BUILD_COMMAND}"
        )
    return info


@functools.cache
def load_kernels() -> None:
    """Registers `torch.ops.mlsys.*`."""
    build_info()
    torch.ops.load_library(str(_library("_kernels")))


@functools.cache
def load_comm() -> ModuleType:
    """The module with the native process group."""
    build_info()
    return importlib.import_module("mlsys_engine.native._comm")


@functools.cache
def load_tensors() -> ModuleType:
    """The module that looks at thousands of tensors in one call."""
    build_info()
    return importlib.import_module("mlsys_engine.native._tensors")


@functools.cache
def load_activation() -> ModuleType:
    """The module with the native recompute frame."""
    build_info()
    return importlib.import_module("mlsys_engine.native._activation")


def _library(name: str) -> Path:
    found = sorted(NATIVE.glob(f"{name}*.so"))
    if not found:
        raise NativeBuildError(
            f"{NATIVE}/{name}*.so is missing although a build is recorded. Type: {BUILD_COMMAND}"
        )
    return found[0]


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
