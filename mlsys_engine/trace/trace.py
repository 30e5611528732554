"""The one entry: a model, and perhaps a sample, become a Trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.trace import inventory
from mlsys_engine.trace.blocks import block_names
from mlsys_engine.trace.execution import (
    EXECUTION,
    Call,
    Executed,
    call_plainly,
    execute_on_data,
    execute_on_fakes,
)
from mlsys_engine.trace.results import blocks_called, blocks_registered, calls_of, cuts_of
from mlsys_engine.trace.values import Trace


def trace(
    model: nn.Module,
    sample: Any = None,
    *,
    call: Call = call_plainly,
    blocks: Sequence[str] | None = None,
    gradients: bool = True,
    compute: bool = False,
) -> Trace:
    """Reads what a model holds and, given a sample, watches one forward and backward of it.

    Called when a plan is made. `sample` is one microbatch; `call(model, sample)` says how the model takes it.
    Both may be on the meta device. Everything runs on fake tensors and leaves no trace on the model: neither
    on values nor on random states. `blocks` are FQNs; None takes what repeats (`block_names`). Without
    `gradients` the forward runs alone, in less time, and nothing is known about the backward.

    Without a sample, or when the model cannot run without data, there are no calls, the order is that of
    registration, and `order_source` says why. With `compute=True` such a model is run for real, once, and put
    back as it was; what it raises then is raised. Raises ConfigError for a block that does not exist.
    """
    names = block_names(model) if blocks is None else _known(model, blocks)
    executed: Executed | None = None
    source = "registration: no sample was given"
    if sample is not None:
        try:
            executed, source = execute_on_fakes(model, sample, call, names, gradients), EXECUTION
        except Exception as error:  # whatever the model's own code raises on fakes; the reason is reported
            source = f"registration: the forward pass on fake tensors raised {type(error).__name__}"
            if compute:
                executed, source = execute_on_data(model, sample, call, names), EXECUTION
    inventoried: dict[str, Any] = {
        "parameters": inventory.parameters(model),
        "buffers": inventory.buffers(model),
        "modules": inventory.modules(model),
        "ties": inventory.ties(model),
        "order_source": source,
    }
    if executed is None:
        return Trace(
            **inventoried,
            blocks=blocks_registered(model, names),
            gradients_source="none: nothing was executed",
        )
    calls = calls_of(model, executed)
    return Trace(
        **inventoried,
        blocks=blocks_called(model, executed.walk),
        calls=calls.calls,
        cuts=cuts_of(executed.walk),
        gradients_source=executed.gradients,
        forward_flops=calls.forward_flops,
        backward_flops=calls.backward_flops,
        saved_bytes=executed.walk.saved_bytes if executed.has_saved else None,
    )


def _known(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    known = [fqn for fqn, _ in model.named_modules()]
    for fqn in blocks:
        if fqn not in known:
            raise ConfigError(
                f"The block {fqn!r} of {type(model).__name__} was to be traced.",
                "The model has no module of that name.",
                did_you_mean(fqn, known),
            )
    return list(blocks)
