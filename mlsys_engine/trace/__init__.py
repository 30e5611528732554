"""What a model holds, in which order it runs and what that costs, found without side effects."""

from mlsys_engine.trace.blocks import block_names
from mlsys_engine.trace.execution import EXECUTION, call_plainly
from mlsys_engine.trace.trace import trace
from mlsys_engine.trace.values import (
    Block,
    BufferInfo,
    Crossing,
    Cut,
    ModuleCall,
    ModuleInfo,
    ParameterInfo,
    TensorInfo,
    Trace,
)

__all__ = [
    "EXECUTION",
    "Block",
    "BufferInfo",
    "Crossing",
    "Cut",
    "ModuleCall",
    "ModuleInfo",
    "ParameterInfo",
    "TensorInfo",
    "Trace",
    "block_names",
    "call_plainly",
    "trace",
]
