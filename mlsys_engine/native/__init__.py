"""Loads the native extensions, or says what to type when they cannot be loaded."""

from mlsys_engine.native.loader import (
    BuildInfo,
    build_info,
    load_activation,
    load_comm,
    load_kernels,
    load_tensors,
)

__all__ = ["BuildInfo", "build_info", "load_activation", "load_comm", "load_kernels", "load_tensors"]
