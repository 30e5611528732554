"""What a trace says about a model: values that can be compared, printed and read without the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """One parameter, under the first of its names (registration order)."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class BufferInfo:
    """One buffer; a buffer that is not persistent is derived, and left out of the state dictionary."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool


@dataclass(frozen=True, kw_only=True)
class ModuleInfo:
    """One module in registration order; the root has the empty name."""

    fqn: str
    class_name: str
    is_leaf: bool
    parameters: tuple[str, ...]  # the FQNs under which this module itself holds parameters


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The first call of one module in a forward; shapes of the tensors in its output, in pytree order."""

    fqn: str
    output_shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The inventory of a model and the order in which a forward pass uses it."""

    parameters: tuple[ParameterInfo, ...]
    buffers: tuple[BufferInfo, ...]
    modules: tuple[ModuleInfo, ...]
    executions: tuple[Execution, ...]  # in order of first call; empty when nothing was executed
    order_source: str  # "execution", or "registration: <why>"
    ties: Mapping[str, str] = field(default_factory=dict)  # alias FQN -> the FQN in `parameters`

    def parameters_in_order(self) -> tuple[ParameterInfo, ...]:
        """Parameters by first use in the forward pass, so that the reverse is when gradients become ready.

        A parameter counts as used when the innermost called module around its owner was entered: functional
        code (nn.MultiheadAttention's out_proj) reads weights of modules that it never calls. Without an
        execution this is the registration order.
        """
        position = {execution.fqn: index for index, execution in enumerate(self.executions)}
        first_use: dict[str, int] = {}
        for module in self.modules:
            where = position.get(_innermost(module.fqn, position), 0)
            for fqn in module.parameters:
                canonical = self.ties.get(fqn, fqn)
                first_use[canonical] = min(where, first_use.get(canonical, where))
        return tuple(sorted(self.parameters, key=lambda parameter: first_use[parameter.fqn]))


def _innermost(fqn: str, called: Mapping[str, int]) -> str:
    while fqn and fqn not in called:
        fqn = fqn.rpartition(".")[0]
    return fqn
