"""Backward passes that stay under a torch function mode, for what is recomputed in them.

A mode is put aside while it handles a function, and `Tensor.backward` is one: a checkpointed block that runs
its forward again in there would see the parts of its parameters as if they were the whole. Autograd's engine
itself takes the modes that are active when it is called along to its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_run = torch.autograd.Variable._execution_engine.run_backward


def of_tensor(
    loss: torch.Tensor,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """As torch.Tensor.backward."""
    of_tensors(loss, gradient, retain_graph, create_graph, inputs=inputs)


def of_tensors(  # noqa: PLR0917 (torch's own signature)
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """As torch.autograd.backward."""
    outputs = _tupled(tensors)
    _run(
        outputs,
        _gradients(outputs, grad_tensors if grad_tensors is not None else grad_variables),
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        () if inputs is None else _tupled(inputs),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _tupled(tensors: Any) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


def _gradients(outputs: Sequence[torch.Tensor], given: Any) -> tuple[torch.Tensor | None, ...]:
    gradients = (None,) * len(outputs) if given is None else _tupled(given)
    return tuple(
        torch.ones_like(output)
        if gradient is None and output.requires_grad and output.numel() == 1
        else gradient
        for output, gradient in zip(outputs, gradients, strict=True)
    )


BACKWARDS: dict[Any, Callable[..., None]] = {
    torch.Tensor.backward: of_tensor,
    torch.autograd.backward: of_tensors,
}
