"""setup.py ends with what to type, and no traceback, when a build cannot work. A stand-in replaces torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "setup.py"
STAND_IN = """
from setuptools.command.build_ext import build_ext
from setuptools import Extension
CUDA_HOME = None

class BuildExtension(build_ext):
    @classmethod
    def with_options(cls, **options):
        return cls

def CppExtension(name, sources, py_limited_api=False, extra_compile_args=None, **options):
    return Extension(name, sources, **options)

CUDAExtension = CppExtension
"""


def _build(tmp_path: Path, torch: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` with a torch whose __init__ has the given text; nothing is ever compiled."""
    utils = tmp_path / "torch" / "utils"
    utils.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text(torch)
    (utils / "__init__.py").touch()
    (utils / "cpp_extension.py").write_text(STAND_IN)
    command = [sys.executable, str(SETUP), "--quiet", "build_ext", "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), **env}
    return subprocess.run(
        command, cwd=SETUP.parent, env=environment, capture_output=True, text=True, check=False
    )


TORCH = "class version: cuda = None\n__version__ = '2.13.0'\n"


@pytest.mark.parametrize(
    ("torch", "env", "told", "action"),
    [
        ("raise ImportError", {}, "torch is not importable", "pip install torch=="),
        (TORCH.replace("2.13.0", "2.9.1"), {}, "torch 2.9.1 is installed", "pip install torch=="),
        (TORCH, {"PATH": "/nonexistent"}, "No C++ compiler was found", "apt-get install g++"),
        (TORCH, {"PATH": "/nonexistent", "CXX": sys.executable}, "ninja is not on PATH", "pip install ninja"),
        (TORCH, {"MLSYS_BUILD_CUDA": "1"}, "MLSYS_BUILD_CUDA=1", "unset MLSYS_BUILD_CUDA"),
        (TORCH, {"MLSYS_BUILD_CUDA": "yes"}, "MLSYS_BUILD_CUDA='yes'", "unset MLSYS_BUILD_CUDA"),
    ],
)
def test_a_build_that_cannot_work_says_what_to_type(
    tmp_path: Path, torch: str, env: dict[str, str], told: str, action: str
) -> None:
    result = _build(tmp_path, torch, **env)
    assert result.returncode == 1
    assert told in result.stderr
    assert action in result.stderr
    assert "Traceback" not in result.stderr
