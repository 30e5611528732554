"""What a trace says about a model: values that can be compared, printed and read without the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mlsys_engine.trace.table import table


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class ParameterInfo(TensorInfo):
    """One parameter, under the first of its names (registration order)."""

    fqn: str
    requires_grad: bool


@dataclass(frozen=True, kw_only=True)
class BufferInfo(TensorInfo):
    """One buffer; a buffer that is not persistent is derived, and left out of the state dictionary."""

    fqn: str
    persistent: bool


@dataclass(frozen=True, kw_only=True)
class ModuleInfo:
    """One module in registration order; the root has the empty name."""

    fqn: str
    class_name: str
    is_leaf: bool
    parameters: tuple[str, ...]  # the FQNs under which this module itself holds parameters


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of one module in a forward, with the calls inside it; tensors in the order of their structure.

    FLOPs are of matrix products, convolutions and attention (a multiply-add counts two), as
    torch.utils.flop_counter counts them. Saved bytes are what autograd keeps for the backward, each storage
    once, without parameters and buffers; None where the call was traced without gradients.
    """

    fqn: str
    index: int  # of this module's calls, from 0
    depth: int  # how many module calls it is inside of
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    parameter_bytes: int  # of the module and those inside it, tied parameters once
    forward_flops: int
    backward_flops: int | None
    saved_bytes: int | None  # when the call returns; mls.memory.SavedActivationMeter around it reads the same
    added_bytes: int | None  # those of them that nothing before the call saves: these add up over calls

    @property
    def label(self) -> str:
        """The FQN, and of a module's further calls the number: `h.0`, `h.0#1`. Unique in a trace."""
        return _label(self.fqn, self.index)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(output.shape for output in self.outputs)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One call of a block; blocks of one kind have equal structure, shapes, types and operations."""

    fqn: str
    index: int  # of this module's calls, from 0
    kind: int  # numbered in order of appearance

    @property
    def label(self) -> str:
        return _label(self.fqn, self.index)


@dataclass(frozen=True, kw_only=True)
class Crossing(TensorInfo):
    """One tensor that is made before a cut and used after it. Parameters and buffers are never listed.

    The key of a tensor is (producer, output, operation): "input:<name>" for the sample's own tensors; a
    module call and the position among its outputs, where a block's call goes before others that return the
    same tensor; or, for what a module's own code makes and does not return, that call and the operation with
    its number there ("aten.add#2": the second one that the code itself runs).
    The same key at several cuts is the same tensor, unless the model writes to it in between.
    """

    producer: str
    output: int | None
    operation: str
    requires_grad: bool  # a gradient of the same size comes back


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What is between two blocks: the moment before `before` is called, or after the last block returned."""

    after: str | None  # label of a block; None at the first cut
    before: str | None  # None at the last one
    tensors: tuple[Crossing, ...]  # in order of production
    num_bytes: int  # of all of them; what they share with each other counts once


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The inventory of a model, what its forward runs, and what that costs. Printing it gives a table."""

    parameters: tuple[ParameterInfo, ...]
    buffers: tuple[BufferInfo, ...]
    modules: tuple[ModuleInfo, ...]
    order_source: str  # "execution", or "registration: <why>"
    ties: Mapping[str, str] = field(default_factory=dict)  # alias FQN -> the FQN in `parameters`
    blocks: tuple[Block, ...] = ()  # in execution order, or in that of registration
    calls: tuple[ModuleCall, ...] = ()  # in the order in which they begin; empty when nothing was executed
    cuts: tuple[Cut, ...] = ()  # before each block call and after the last; empty when nothing was executed
    gradients_source: str = "none"  # "execution", or "none: <why>" when saved or backward figures are missing
    # All that the forward did, and what is outside of the model (a loss computed by `call`), too.
    forward_flops: int = 0
    backward_flops: int | None = None
    saved_bytes: int | None = None  # when the forward has returned

    def parameters_in_order(self) -> tuple[ParameterInfo, ...]:
        """Parameters by first use in the forward pass, so that the reverse is when gradients become ready.

        A parameter counts as used when the innermost called module around its owner was entered: functional
        code (nn.MultiheadAttention's out_proj) reads weights of modules that it never calls. Without an
        execution this is the registration order.
        """
        position: dict[str, int] = {}
        for index, call in enumerate(self.calls):
            position.setdefault(call.fqn, index)
        first_use: dict[str, int] = {}
        for module in self.modules:
            where = position.get(_innermost(module.fqn, position), 0)
            for fqn in module.parameters:
                canonical = self.ties.get(fqn, fqn)
                first_use[canonical] = min(where, first_use.get(canonical, where))
        return tuple(sorted(self.parameters, key=lambda parameter: first_use[parameter.fqn]))

    def calls_of(self, fqn: str) -> tuple[ModuleCall, ...]:
        """The calls of one module, in order; empty when the forward never calls it."""
        return tuple(call for call in self.calls if call.fqn == fqn)

    def repeated_blocks(self) -> tuple[tuple[str, ...], ...]:
        """The labels of the blocks by kind: what holds for one of a group holds for all of it."""
        groups: dict[int, list[str]] = {}
        for block in self.blocks:
            groups.setdefault(block.kind, []).append(block.label)
        return tuple(map(tuple, groups.values()))

    def __str__(self) -> str:
        return table(self)


def _label(fqn: str, index: int) -> str:
    return f"{fqn}#{index}" if index else fqn


def _innermost(fqn: str, called: Mapping[str, int]) -> str:
    while fqn and fqn not in called:
        fqn = fqn.rpartition(".")[0]
    return fqn
