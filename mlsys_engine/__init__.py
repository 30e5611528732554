"""mlsys_engine: a distributed training engine with native kernels. Import it as `mls`.

Importing it opens no socket, starts no thread and touches no device. `mls.plan` and `mls.verify` are the
functions, although folders of those names hold the Plan and the Verdict: importing the function imports that
folder first, and nothing later. Inside the package write `from mlsys_engine.plan.x import y`.
"""

from mlsys_engine import (
    activation,
    checkpoint,
    comm,
    data,
    errors,
    evaluation,
    memory,
    models,
    optim,
    pipeline,
    telemetry,
    tensor_parallel,
    trace,
    tracking,
)
from mlsys_engine.comm.launch import World, init
from mlsys_engine.plan import EvalResult, Plan, Runner, StepResult
from mlsys_engine.strategies import (
    DataParallel,
    HybridParallel,
    ModelParallel,
    PipelineParallel,
    apply,
    plan,
    wrap,
)
from mlsys_engine.trainer import SaveEvery, Trainer, TrainingInterrupted
from mlsys_engine.verify import Verdict, verify

__version__ = "0.1.0"

__all__ = [
    "DataParallel",
    "EvalResult",
    "HybridParallel",
    "ModelParallel",
    "PipelineParallel",
    "Plan",
    "Runner",
    "SaveEvery",
    "StepResult",
    "Trainer",
    "TrainingInterrupted",
    "Verdict",
    "World",
    "__version__",
    "activation",
    "apply",
    "checkpoint",
    "comm",
    "data",
    "errors",
    "evaluation",
    "init",
    "memory",
    "models",
    "optim",
    "pipeline",
    "plan",
    "telemetry",
    "tensor_parallel",
    "trace",
    "tracking",
    "verify",
    "wrap",
]
