"""Builds and runs the C++ tests of csrc/memory, csrc/comm and csrc/activation."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mlsys_engine.native import build_info
from tests.support import soak

HERE = Path(__file__).resolve().parent
# Of an in-place build, which build_info() refuses when they are not those of the present sources.
OBJECTS = HERE.parents[1] / "build" / "native" / "shared"
needs_compiler = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("g++") is None, reason="make and g++ are needed"
)


def make(target: str, timeout_s: float, *variables: str) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", "-s", "-j2", "-C", str(HERE), target, *variables],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiler
@pytest.mark.slow  # compiles for half a minute
def test_native_tests_pass_and_no_malformed_frame_breaks_a_parser() -> None:
    variables = [f"SHIPPED={OBJECTS}"] if OBJECTS.is_dir() and build_info().source_hash else []
    told = make("check", 900, "fuzz", *variables)
    assert "tests passed" in told
    assert "inputs parsed" in told


@needs_compiler
@pytest.mark.soak  # five minutes each
@pytest.mark.skipif(soak.SAMPLE in os.environ, reason="a sample of the soak tests: see scripts/sanitize")
@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_native_tests_pass_under_the_sanitizers(sanitizer: str) -> None:
    assert "tests passed" in make(sanitizer, 1200)
