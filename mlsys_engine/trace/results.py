"""Turns what a walk saw into the values of a Trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mlsys_engine.trace.execution import Executed
from mlsys_engine.trace.values import Block, Cut, ModuleCall
from mlsys_engine.trace.walk import CallRecord, Walk


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The calls, and the FLOPs of the whole forward and backward."""

    calls: tuple[ModuleCall, ...]
    forward_flops: int
    backward_flops: int | None


def calls_of(model: nn.Module, executed: Executed) -> Calls:
    """The module calls in execution order; FLOPs include those of the calls inside."""
    records = executed.walk.calls
    forward = [record.forward_flops for record in records]
    backward = [record.backward_flops for record in records]
    for position in reversed(range(len(records))):  # callers come before what they call
        parent = records[position].parent
        if parent >= 0:
            forward[parent] += forward[position]
            backward[parent] += backward[position]
    sizes = {fqn: _parameter_bytes(module) for fqn, module in model.named_modules()}
    calls = tuple(
        ModuleCall(
            fqn=record.fqn,
            index=record.index,
            depth=record.depth,
            inputs=record.inputs,
            outputs=record.outputs,
            parameter_bytes=sizes[record.fqn],
            forward_flops=forward[position],
            backward_flops=backward[position] if executed.has_backward else None,
            saved_bytes=record.saved_bytes if executed.has_saved else None,
            added_bytes=record.added_bytes if executed.has_saved else None,
        )
        for position, record in enumerate(records)
    )
    everything = (executed.walk.outside, *records)
    return Calls(
        calls=calls,
        forward_flops=sum(record.forward_flops for record in everything),
        backward_flops=sum(record.backward_flops for record in everything) if executed.has_backward else None,
    )


def blocks_called(model: nn.Module, walk: Walk) -> tuple[Block, ...]:
    """The blocks in execution order. Those of one kind ran the same operations on the same shapes, too."""
    records = [walk.calls[position] for position in walk.block_calls]
    return _numbered(
        [(record.fqn, record.index) for record in records],
        [(_structure(model.get_submodule(record.fqn)), _run(record)) for record in records],
    )


def blocks_registered(model: nn.Module, names: Sequence[str]) -> tuple[Block, ...]:
    """The blocks of a model that nobody ran, by their structure alone."""
    return _numbered([(name, 0) for name in names], [_structure(model.get_submodule(name)) for name in names])


def cuts_of(walk: Walk) -> tuple[Cut, ...]:
    """The cuts before each block call and after the last one."""
    labels = [walk.calls[position].label for position in walk.block_calls]
    return tuple(
        Cut(after=after, before=before, tensors=tensors, num_bytes=num_bytes)
        for after, before, (tensors, num_bytes) in zip(
            (None, *labels), (*labels, None), walk.lives.crossings(walk.moments), strict=False
        )
    )


def _numbered(names: Sequence[tuple[str, int]], kinds: Sequence[object]) -> tuple[Block, ...]:
    numbers: list[object] = []
    blocks = []
    for (fqn, index), kind in zip(names, kinds, strict=True):
        if kind not in numbers:
            numbers.append(kind)
        blocks.append(Block(fqn=fqn, index=index, kind=numbers.index(kind)))
    return tuple(blocks)


def _structure(module: nn.Module) -> object:
    return (
        type(module),
        repr(module),
        tuple(part.training for part in module.modules()),
        tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()),
    )


def _run(record: CallRecord) -> object:
    return (record.inputs, record.grads_in, record.outputs, tuple(record.seen))


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.dtype.itemsize for parameter in module.parameters())
