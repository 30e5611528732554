"""The one entry: a model, and perhaps a sample, become a Trace."""

from __future__ import annotations

from typing import Any

from torch import nn

from mlsys_engine.trace import inventory
from mlsys_engine.trace.execution import Call, call_plainly, execute
from mlsys_engine.trace.values import Execution, Trace

EXECUTION = "execution"


def trace(model: nn.Module, sample: Any = None, *, call: Call = call_plainly) -> Trace:
    """Reads a model's parameters, buffers and modules and, given a sample, the order in which they run.

    Called when a plan is made. `sample` is one microbatch; `call(model, sample)` says how the model takes it.
    The forward pass runs on fake tensors and leaves no trace on the model. Without a sample, or when the
    model cannot run without data, the order is that of registration and `order_source` says why.
    """
    executions: tuple[Execution, ...] = ()
    source = "registration: no sample was given"
    if sample is not None:
        try:
            executions, source = execute(model, sample, call), EXECUTION
        except Exception as error:  # whatever the model's own code raises on fakes; the reason is reported
            source = f"registration: the forward pass on fake tensors raised {type(error).__name__}"
    return Trace(
        parameters=inventory.parameters(model),
        buffers=inventory.buffers(model),
        modules=inventory.modules(model),
        executions=executions,
        order_source=source,
        ties=inventory.ties(model),
    )
