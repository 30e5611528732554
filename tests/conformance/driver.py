"""Runs torch's own DistributedTest suite, which ships in the wheel, against a registered c10d backend.

    BACKEND=mlsys BACKEND_PLUGIN=mlsys_engine.comm WORLD_SIZE=2 \\
        python -m tests.conformance.driver --results results.json [test_all_reduce_sum ...]

The suite knows the backends it was written for by name. In memory only, its gates for gloo (for all_to_all on
CPU tensors also mpi's) are widened to the backend under test. Gloo itself is made impossible to construct
before any rank is forked, so no test can pass by way of it. DIST_FORK=0 spawns ranks: four times slower.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "torch.testing._internal.distributed.distributed_test"


def set_environment() -> str:
    """Fills in the variables that the suite reads at import; returns the backend's name."""
    backend = os.environ.setdefault("BACKEND", "gloo")
    os.environ.setdefault("WORLD_SIZE", "2")
    os.environ.setdefault("INIT_METHOD", "env://")
    if "TEMP_DIR" not in os.environ:  # once, by the parent: spawned ranks inherit it
        os.environ["TEMP_DIR"] = tempfile.mkdtemp(prefix="disttest_")
    return backend


def register(backend: str) -> None:
    """Imports the plug-in, in the parent and in every spawned rank, and tells the suite what it can do."""
    plugin = os.environ.get("BACKEND_PLUGIN")
    if plugin:
        importlib.import_module(plugin)
    import torch.testing._internal.common_distributed as common

    if backend not in ("gloo", "nccl", "mpi", "ucc"):
        common.DistTestCases.backend_feature["plugin"].add(backend)
        for feature in ("ddp", "subgroup"):
            common.DistTestCases.backend_feature[feature].add(backend)


def load_suite(backend: str) -> ModuleType:
    """The suite's module, its gates widened to `backend`."""
    if backend == "gloo":
        return importlib.import_module(MODULE)
    spec = importlib.util.find_spec(MODULE)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    for old, new in (
        ('BACKEND != "gloo"', f'BACKEND not in ("gloo", "{backend}")'),
        ('BACKEND == "gloo"', f'BACKEND in ("gloo", "{backend}")'),
        ('BACKEND != "mpi"', f'BACKEND not in ("mpi", "{backend}")'),
        (
            'require_backend_is_available({"gloo"})',
            f'require_backend_is_available({{"gloo", "{backend}"}})',
        ),
    ):
        source = source.replace(old, new)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    exec(compile(source, spec.origin, "exec", dont_inherit=True), module.__dict__)  # not our __future__
    return module


BACKEND = set_environment()
register(BACKEND)
if BACKEND != "gloo":
    from tests.support.no_gloo import forbid_gloo

    forbid_gloo()
SUITE = load_suite(BACKEND)


class DistributedSuite(SUITE.TestDistBackend, SUITE.DistributedTest._DistTestBase):
    """The whole suite, each test on WORLD_SIZE ranks of its own."""

    def setUp(self) -> None:
        super().setUp()
        if os.environ.get("DIST_FORK", "1") == "1":
            self._start_processes(multiprocessing.get_context("fork").Process)
        else:
            self._spawn_processes()


class Recorder(unittest.TextTestResult):
    """Also keeps what became of each test: "passed", "skipped: why" or "failed: the error"."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.outcomes: dict[str, str] = {}

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.outcomes[test._testMethodName] = "passed"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self.outcomes[test._testMethodName] = f"skipped: {reason}"

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self.outcomes[test._testMethodName] = f"failed: {err[1]}"

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self.outcomes[getattr(test, "_testMethodName", str(test))] = f"failed: {err[1]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, required=True, help="JSON file with each test's outcome")
    parser.add_argument("names", nargs="*", help="tests to run; all when none is named")
    arguments = parser.parse_args()
    names = arguments.names or unittest.defaultTestLoader.getTestCaseNames(DistributedSuite)
    suite = unittest.TestSuite(DistributedSuite(name) for name in names)
    result = unittest.TextTestRunner(resultclass=Recorder, verbosity=2).run(suite)
    arguments.results.write_text(json.dumps(result.outcomes, indent=1))


if __name__ == "__main__":
    main()
