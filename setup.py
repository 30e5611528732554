"""Builds the three native extensions. Everything declarative is in pyproject.toml.

_kernels     torch.ops.mlsys.* through torch's stable ABI (one binary serves several torch versions)
_comm        the c10d process group, through torch's own headers and its bundled pybind11
_activation  the recompute frame, plain pybind11, no torch headers

Environment: MAX_JOBS, MLSYS_BUILD_CUDA=0|1 (default: when torch has CUDA and nvcc is there), TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "mlsys_engine" / "native"))
from source_hash import hash_sources  # noqa: E402  (a file of the package that imports nothing else)


def fail(given: str, expected: str, action: str) -> None:
    sys.exit(f"\nmlsys_engine: {given} {expected}\n  {action}\n")


try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    fail(
        "torch is not importable in this environment.",
        "The native extensions are built against an installed torch, without build isolation.",
        "Type: pip install torch==2.13.0 && pip install --no-build-isolation -e .",
    )

OLDEST_TORCH = (2, 11)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    fail(f"torch {torch.__version__} is installed.", "torch 2.11 or newer is needed.", "Type: pip install torch==2.13.0")
if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
    fail("No C++ compiler was found.", "g++ 11 or newer (or clang 14) must be on PATH.",
         "Type: apt-get install g++   (or name one: CXX=/path/to/g++)")


def wants_cuda() -> bool:
    """CUDA kernels are compiled in when torch has CUDA and nvcc exists; MLSYS_BUILD_CUDA overrides."""
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    asked = os.environ.get("MLSYS_BUILD_CUDA")
    if asked == "1" and not possible:
        fail("MLSYS_BUILD_CUDA=1 is set.", f"torch must have CUDA (it has {torch.version.cuda}) and nvcc must exist.",
             "Install a CUDA build of torch and the CUDA toolkit, or unset MLSYS_BUILD_CUDA.")
    return possible if asked is None else asked == "1"


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# -fno-math-errno and -fno-trapping-math let loops with sqrt and comparisons vectorise without changing a value;
# -ffp-contract=off keeps every instruction set on the same bits.
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
             "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-g0"]
# The first torch whose stable ABI the kernels use: 2.10, so that 2.11 to 2.13 load one binary.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
INCLUDES = [str(ROOT / "csrc")]


def extensions() -> list:
    cuda = wants_cuda()
    kernel_sources = sources("csrc/core/*.cpp", "csrc/optim/**/*.cpp", "csrc/activation/**/*.cpp", "csrc/bindings/kernels/*.cpp")
    kernel_flags = {"cxx": [*CXX_FLAGS, *STABLE_ABI]}
    make_kernels = CppExtension
    if cuda:
        make_kernels = CUDAExtension
        kernel_sources += sources("csrc/optim/**/*.cu", "csrc/activation/**/*.cu", "csrc/bindings/kernels/*.cu")
        kernel_flags["cxx"].append("-DUSE_CUDA")
        kernel_flags["nvcc"] = ["-O3", "-std=c++20", "--fmad=false", "-DUSE_CUDA", *STABLE_ABI]
    return [
        make_kernels("mlsys_engine.native._kernels", kernel_sources, include_dirs=INCLUDES,
                     extra_compile_args=kernel_flags, py_limited_api=True),
        CppExtension("mlsys_engine.native._comm",
                     sources("csrc/core/*.cpp", "csrc/memory/*.cpp", "csrc/comm/**/*.cpp", "csrc/bindings/comm/*.cpp"),
                     include_dirs=INCLUDES, extra_compile_args={"cxx": CXX_FLAGS}),
        CppExtension("mlsys_engine.native._activation", sources("csrc/bindings/activation/*.cpp"),
                     include_dirs=INCLUDES, extra_compile_args={"cxx": CXX_FLAGS}),
    ]


class Build(BuildExtension):
    """torch's ninja build with a fixed object folder, so that editable installs rebuild only what changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "native")

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode  # setuptools clears `inplace` while it runs
        super().run()
        record = {
            "torch": torch.__version__,
            "torch_cuda": torch.version.cuda,
            "cuda_kernels": wants_cuda(),
            "source_hash": hash_sources(ROOT / "csrc"),
            "built": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        target = ROOT / "mlsys_engine" if in_place else Path(self.build_lib) / "mlsys_engine"
        (target / "native" / "_build.json").write_text(json.dumps(record, indent=1))


ext_modules = [extension for extension in extensions() if extension.sources]
only = os.environ.get("MLSYS_BUILD_ONLY")  # developers: build one extension, e.g. MLSYS_BUILD_ONLY=_kernels
if only:
    ext_modules = [extension for extension in ext_modules if extension.name.endswith(only)]
setup(ext_modules=ext_modules, cmdclass={"build_ext": Build.with_options(use_ninja=True)})
