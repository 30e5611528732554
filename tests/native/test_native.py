"""Builds and runs the C++ tests of csrc/memory and csrc/comm."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
needs_compiler = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("g++") is None, reason="make and g++ are needed"
)


def make(target: str, timeout_s: float) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", "-s", "-j2", "-C", str(HERE), target],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiler
@pytest.mark.slow  # compiles for minutes
def test_native_tests_pass_under_asan_and_no_malformed_frame_breaks_a_parser() -> None:
    done = make("asan", 900)
    assert "tests passed" in done
    assert "inputs parsed" in done


@needs_compiler
@pytest.mark.slow
def test_native_tests_pass_under_tsan() -> None:
    assert "tests passed" in make("tsan", 900)
