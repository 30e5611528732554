"""What a model holds and in which order it runs, found without side effects."""

from mlsys_engine.trace.execution import call_plainly
from mlsys_engine.trace.trace import EXECUTION, trace
from mlsys_engine.trace.values import BufferInfo, Execution, ModuleInfo, ParameterInfo, Trace

__all__ = [
    "EXECUTION",
    "BufferInfo",
    "Execution",
    "ModuleInfo",
    "ParameterInfo",
    "Trace",
    "call_plainly",
    "trace",
]
