"""`import mlsys_engine as mls`: its names, and that importing it does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest

import mlsys_engine as mls

# Runs in a fresh interpreter: prints what importing the package has started, opened and loaded.
_PROBE = """
import json, os, sys, threading
import torch
def look():
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    targets = [os.readlink(path) for path in paths if os.path.exists(path)]
    sockets = sorted(target for target in targets if target.startswith("socket"))
    return {"sockets": sockets, "tasks": len(os.listdir("/proc/self/task"))}
before = look()
import mlsys_engine
after = look()
heavy = ["transformers", "mpi4py", "matplotlib", "torch._dynamo", "torch._inductor", "tyro", "pytest"]
heavy += ["torch.distributed.checkpoint", "torch.distributed.tensor", "torch.distributed.fsdp"]
print(json.dumps({"before": before, "after": after, "heavy": [name for name in heavy if name in sys.modules],
                  "cuda": torch.cuda.is_initialized(), "threads": threading.active_count()}))
"""


def test_importing_opens_no_socket_starts_no_thread_and_touches_no_device() -> None:
    output = subprocess.run([sys.executable, "-c", _PROBE], check=True, capture_output=True, text=True).stdout
    seen = json.loads(output)
    assert seen["after"] == seen["before"]
    assert seen["threads"] == 1
    assert seen["cuda"] is False
    assert seen["heavy"] == []


def test_plan_is_the_function_although_a_folder_has_its_name() -> None:
    assert isinstance(mls.plan, types.FunctionType)


def test_plan_and_verify_stay_functions_after_their_folders_are_imported_from() -> None:
    code = "import mlsys_engine as mls, types\nfrom mlsys_engine.plan.runner import StepResult\n"
    code += "import mlsys_engine.plan\nimport mlsys_engine.verify.verdict\n"
    code += "assert isinstance(mls.plan, types.FunctionType) and isinstance(mls.verify, types.FunctionType)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", mls.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(mls, name) is not None
