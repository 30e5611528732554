"""Builds the four native extensions. Everything declarative is in pyproject.toml.

_kernels     torch.ops.mlsys.* through torch's stable ABI (one binary serves several torch versions)
_comm        the c10d process group, through torch's own headers and its bundled pybind11, with CUDA kernels
             when those of _kernels are built
_tensors     what the optimizers ask of thousands of tensor objects, through torch's Python headers
_activation  the recompute frame, through torch's own headers, and the budget solver

Environment: MAX_JOBS, TORCH_CUDA_ARCH_LIST, MLSYS_BUILD_CUDA=0|1 (default: when torch has CUDA and nvcc is
there), MLSYS_BUILD_ONLY=_kernels|_comm|_tensors|_activation.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "mlsys_engine" / "native"))
from source_hash import hash_sources  # noqa: E402  (a file of the package that imports nothing else)


def fail(given: str, expected: str, action: str) -> NoReturn:
    """Ends the build with the three parts of an error and no traceback."""
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

# -fno-math-errno and -fno-trapping-math let loops with sqrt and comparisons vectorise without changing a
# value; -ffp-contract=off keeps every instruction set on the same bits.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unknown-pragmas",
    "-g0",
]
# The first torch whose stable ABI the kernels use: 2.10, so that 2.11 to 2.13 load one binary.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false"]
INCLUDES = [str(ROOT / "csrc")]
# Files of bindings that are compiled as one unit: reading torch's headers takes longer than all that follows.
FILES_IN_A_UNIT = 12


def check_tools() -> None:
    """Says what to type when the build cannot work, before it starts."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        fail(
            f"torch {torch.__version__} is installed.",
            "torch 2.11 or newer is needed.",
            "Type: pip install torch==2.13.0",
        )
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        fail(
            "No C++ compiler was found.",
            "g++ 11 or newer (or clang 14) must be on PATH.",
            "Type: apt-get install g++   (or name one: CXX=/path/to/g++)",
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        fail(
            f"Python.h is missing from {sysconfig.get_paths()['include']}.",
            "The headers of this Python are needed to build extensions.",
            "Type: apt-get install python3-dev",
        )
    if shutil.which("ninja") is None:
        fail(
            "ninja is not on PATH.",
            "The build runs its compilers in parallel through it.",
            "Type: pip install ninja   (and activate the environment it is in)",
        )


def wants_cuda() -> bool:
    """CUDA kernels are compiled in when torch has CUDA and nvcc exists; MLSYS_BUILD_CUDA overrides."""
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    asked = os.environ.get("MLSYS_BUILD_CUDA")
    if asked not in {None, "0", "1"}:
        fail(f"MLSYS_BUILD_CUDA={asked!r} is set.", "It is 0 or 1.", "Type: unset MLSYS_BUILD_CUDA")
    if asked == "1" and not possible:
        fail(
            "MLSYS_BUILD_CUDA=1 is set.",
            f"torch must have CUDA (it has {torch.version.cuda}) and nvcc must exist.",
            "Install a CUDA build of torch and the CUDA toolkit, or unset MLSYS_BUILD_CUDA.",
        )
    return possible if asked is None else asked == "1"


def sources(*patterns: str) -> list[str]:
    """The files of the patterns, in an order that does not depend on the file system."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


HEADERS = sources("csrc/**/*.h", "csrc/**/*.cuh")


def kernels() -> Extension:
    """torch.ops.mlsys.*, with the CUDA sources when they are wanted."""
    files = sources(
        "csrc/core/*.cpp",
        "csrc/optim/**/*.cpp",
        "csrc/activation/*/**/*.cpp",  # its kernels; the files above them are _activation's
        "csrc/bindings/kernels/*.cpp",
    )
    flags = {"cxx": [*CXX_FLAGS, *STABLE_ABI]}
    make = CppExtension
    if wants_cuda():
        make = CUDAExtension
        files += sources("csrc/optim/**/*.cu", "csrc/activation/**/*.cu", "csrc/bindings/kernels/*.cu")
        flags["cxx"].append("-DUSE_CUDA")
        flags["nvcc"] = [*NVCC_FLAGS, "-DUSE_CUDA", *STABLE_ABI]
    return make(
        "mlsys_engine.native._kernels",
        files,
        include_dirs=INCLUDES,
        extra_compile_args=flags,  # of its bindings and CUDA sources: the rest has those of the others
        py_limited_api=True,
        depends=HEADERS,
    )


def comm() -> Extension:
    """The process group, with the all-reduce between GPUs when CUDA is wanted."""
    files = sources(
        "csrc/core/*.cpp",
        "csrc/memory/*.cpp",
        "csrc/comm/**/*.cpp",
        "csrc/optim/*.cpp",  # the fused step runs their rules
        "csrc/bindings/comm/*.cpp",
    )
    make = CppExtension
    if wants_cuda():
        make = CUDAExtension
        files += sources("csrc/comm/**/*.cu")
    return make(
        "mlsys_engine.native._comm",
        files,
        include_dirs=INCLUDES,
        extra_compile_args={"nvcc": NVCC_FLAGS},
        depends=HEADERS,
    )


def plain(name: str, *patterns: str) -> Extension:
    """An extension of C++ sources alone."""
    return CppExtension(
        f"mlsys_engine.native.{name}",
        sources(*patterns),
        include_dirs=INCLUDES,
        depends=HEADERS,
    )


def extensions() -> list[Extension]:
    """All four, or the one that MLSYS_BUILD_ONLY names."""
    every = [
        kernels(),
        comm(),
        plain("_tensors", "csrc/bindings/tensors/*.cpp"),
        plain("_activation", "csrc/core/*.cpp", "csrc/activation/*.cpp", "csrc/bindings/activation/*.cpp"),
    ]
    only = os.environ.get("MLSYS_BUILD_ONLY", "")
    return [extension for extension in every if extension.sources and extension.name.endswith(only)]


def split_sources(extension: Extension) -> tuple[list[str], list[str], list[str]]:
    """Its C++ without torch, its bindings with torch's full headers, and what needs flags of its own."""
    core, bindings, own = [], [], []
    for file in extension.sources:
        if not file.startswith("csrc/bindings/") and file.endswith(".cpp"):
            core.append(file)
        elif file.startswith("csrc/bindings/kernels/") or not file.endswith(".cpp"):
            own.append(file)
        else:
            bindings.append(file)
    return core, bindings, own


def write_units(folder: Path, name: str, files: list[str]) -> list[str]:
    """Sources that include `files`, a dozen each or fewer. One that has not changed is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-len(files) // FILES_IN_A_UNIT)
    units = []
    for number in range(count):
        part = files[number * len(files) // count : (number + 1) * len(files) // count]
        text = "".join(f'#include "{file.removeprefix("csrc/")}"\n' for file in part)
        unit = folder / f"{name}_{number}.cpp"
        if not unit.exists() or unit.read_text() != text:
            unit.write_text(text)
        units.append(str(unit.relative_to(ROOT)))
    return units


class Build(BuildExtension):
    """torch's ninja build, which compiles what the extensions have in common once, and bindings in units.

    Objects stay below build/native, wherever pip builds, so that editable installs rebuild only what changed.
    """

    def finalize_options(self) -> None:
        """Fixes the object folder."""
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "native")
        self.objects: dict[str, list[str]] | None = None

    def build_extension(self, ext: Extension) -> None:
        """Compiles what has flags of its own in a folder of its own, and links it with what is shared."""
        if self.objects is None:
            self.objects = self.compile_shared()
        ext.extra_objects = self.objects[ext.name]
        ext.sources = split_sources(ext)[2]
        shared = self.build_temp
        self.build_temp = str(Path(shared) / ext.name.rpartition(".")[2])
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared

    def compile_shared(self) -> dict[str, list[str]]:
        """Compiles core and bindings of all extensions in one run of ninja; returns the objects of each."""
        parts: dict[str, list[str]] = {}
        for ext in self.extensions:
            core, bindings, _ = split_sources(ext)
            name = ext.name.rpartition(".")[2]
            parts[ext.name] = write_units(Path(self.build_temp) / "units", name, bindings) + core
        # Units first: they take longest.
        files = sorted({file for part in parts.values() for file in part}, key=lambda f: (f[:4] == "csrc", f))
        compile_objects = self.compiler.compile
        objects = compile_objects(
            files,
            output_dir=str(Path(self.build_temp) / "shared"),
            include_dirs=list(
                dict.fromkeys(folder for ext in self.extensions for folder in ext.include_dirs)
            ),
            extra_postargs={"cxx": [*CXX_FLAGS, *(["-DMLSYS_CUDA"] if wants_cuda() else [])]},
        )
        # An extension may have no more to compile; torch's ninja build refuses that.
        self.compiler.compile = lambda files, **options: compile_objects(files, **options) if files else []
        made = dict(zip(files, objects, strict=True))
        return {name: [made[file] for file in part] for name, part in parts.items()}

    def run(self) -> None:
        """Builds, and records for the loader what was built from which sources against which torch."""
        check_tools()
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


setup(ext_modules=extensions(), cmdclass={"build_ext": Build.with_options(use_ninja=True)})
