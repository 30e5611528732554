"""mlsys_engine: a distributed training engine with native kernels. Import it as `mls`.

Importing it opens no socket, starts no thread and touches no device. `mls.plan` is the function, although a
folder of that name holds the Plan: importing the function imports that folder first, and nothing does so later.
Inside the package write `from mlsys_engine.plan.x import y`.
"""

from mlsys_engine import (
    activation,
    comm,
    data,
    errors,
    evaluation,
    memory,
    models,
    optim,
    telemetry,
    tracking,
)
from mlsys_engine.comm.launch import World, init

__version__ = "0.1.0"

__all__ = [
    "World",
    "__version__",
    "activation",
    "comm",
    "data",
    "errors",
    "evaluation",
    "init",
    "memory",
    "models",
    "optim",
    "telemetry",
    "tracking",
]
