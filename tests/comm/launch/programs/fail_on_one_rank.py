"""The rank named by the first argument fails in the way named by the second, while the others wait for it.

Writes each rank's process id, and the time of the failure, to the folder of the third argument, so that a
test can tell how long the others stayed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import mlsys_engine as mls
from mlsys_engine.errors import ConfigError


def fail(kind: str) -> None:
    if kind == "exception":
        raise RuntimeError("the culprit's own words")
    if kind == "user_error":
        raise ConfigError("bucket_mib=-1.", "It must be above 0.", "Leave it out.")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(7)


def main() -> None:
    culprit, kind, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    world = mls.init(timeout_s=60)
    value = torch.ones(1)
    dist.all_reduce(value)
    (folder / f"pid{world.rank}").write_text(str(os.getpid()))
    dist.barrier()
    if world.rank == culprit:
        (folder / "failed_at").write_text(repr(time.time()))
        fail(kind)
    dist.all_reduce(value)
    raise AssertionError("an operation succeeded although a rank had failed")


main()
