"""One forward, and its backward, watched operation by operation: what each module call takes and costs.

The walk is a dispatch mode, module hooks and saved-tensor hooks, and does not care whether tensors are fake.
An operation of the backward belongs to the call in which its autograd node was made: nodes are numbered, and
the numbers at which calls begin and end are written down.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlsys_engine.trace.flops import flops_of
from mlsys_engine.trace.liveness import Lives, Origin
from mlsys_engine.trace.saved import Held, SavedBytes, is_counted, storages_of
from mlsys_engine.trace.structure import named_tensors, tensors_of
from mlsys_engine.trace.values import TensorInfo

_OUTSIDE = -1  # the position of what runs in no module call


@dataclass(kw_only=True)
class CallRecord:
    """One module call while it is watched; FLOPs are of its own code, without the calls inside."""

    fqn: str
    index: int
    parent: int
    depth: int
    entered: int
    inputs: tuple[TensorInfo, ...]
    grads_in: tuple[bool, ...]  # which inputs want gradients
    saved: SavedBytes = field(default_factory=SavedBytes)
    saved_before: int = 0
    outputs: tuple[TensorInfo, ...] = ()
    saved_bytes: int = 0
    added_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    operations: Counter[str] = field(default_factory=Counter)  # that its own code ran so far
    seen: list[object] = field(default_factory=list)  # of a block: all operations with their output shapes

    @property
    def label(self) -> str:
        return f"{self.fqn}#{self.index}" if self.index else self.fqn


class Walk(TorchDispatchMode):
    """Watches one forward of a model, and one backward. `blocks` are FQNs; cuts lie between their calls."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self.calls: list[CallRecord] = []
        self.block_calls: list[int] = []  # positions in `calls`
        self.lives = Lives()
        self.cut_moments: list[int] = []
        self.outside = CallRecord(
            fqn="", index=0, parent=_OUTSIDE, depth=0, entered=0, inputs=(), grads_in=()
        )
        self.saved_bytes = 0
        self._model, self._blocks = model, frozenset(blocks)
        self._excluded = storages_of((*model.parameters(), *model.buffers()))
        self._open: list[int] = []
        self._open_block: int | None = None
        self._num_calls: dict[str, int] = {}
        self._moment = self._end_of_blocks = 0
        self._nodes: list[tuple[int, int]] = []  # (first node's number, position of the call that makes it)
        self._end_of_nodes = 0
        self._of_last_node = self.outside
        self._paused = self._in_backward = False

    def forward(self, run: Callable[[], Any], sample: Any) -> Any:
        """Runs the model once and returns what it returns."""
        for name, tensor in named_tensors(sample):
            self.lives.make(tensor, self._next(), Origin(producer=f"input:{name or 0}"))
        self._mark_nodes()
        with self._hooked(), torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack), self:
            output = run()
        self._end_of_nodes = torch._C._autograd._get_sequence_nr()
        for tensor in tensors_of(output):
            self.lives.read(tensor, self._next())
        self.saved_bytes = self.outside.saved.current_bytes
        return output

    def backward(self, run: Callable[[], Any]) -> None:
        """Runs the backward of what `forward` returned."""
        self._in_backward = True
        with self:
            run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._paused and func.namespace != "prim":
            self._paused = True  # what is looked at here may run operations itself
            try:
                if self._in_backward:
                    self._call_of_node().backward_flops += flops_of(func, args, kwargs or {}, output)
                else:
                    self._observe(func, args, kwargs or {}, output)
            finally:
                self._paused = False
        return output

    def _observe(self, func: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = self._innermost()
        call.forward_flops += flops_of(func, args, kwargs, output)
        name = f"{func.namespace}.{func._opname}"
        call.operations[name] += 1
        origin = Origin(producer=call.label, operation=f"{name}#{call.operations[name]}")
        moment = self._next()
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if self._open_block is not None:
            self.calls[self._open_block].seen.append((name, *(tuple(made.shape) for made in outputs)))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self.lives.read(tensor, moment)
        for tensor in _written(func, args, kwargs):
            self.lives.write(tensor, moment, origin)
        for tensor in outputs:
            self.lives.make(tensor, moment, origin)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for fqn, module in self._model.named_modules():

            def enter(module: nn.Module, args: Any, kwargs: Any, fqn: str = fqn) -> None:
                self._enter(fqn, args, kwargs)

            def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                self._leave(output)

            handles += [
                module.register_forward_pre_hook(enter, with_kwargs=True),
                module.register_forward_hook(leave, with_kwargs=True, always_call=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, fqn: str, args: Any, kwargs: Any) -> None:
        tensors = tensors_of((args, kwargs))
        index = self._num_calls.get(fqn, 0)
        self._num_calls[fqn] = index + 1
        call = CallRecord(
            fqn=fqn,
            index=index,
            parent=self._open[-1] if self._open else _OUTSIDE,
            depth=len(self._open),
            entered=self._next(),
            inputs=_infos(tensors),
            grads_in=tuple(tensor.requires_grad for tensor in tensors),
            saved_before=self.outside.saved.current_bytes,
        )
        position = len(self.calls)
        self.calls.append(call)
        self._open.append(position)
        self._mark_nodes()
        if fqn in self._blocks and self._open_block is None:  # a block inside a block is a part of it
            self._open_block = position
            self.block_calls.append(position)
            self.cut_moments.append(call.entered)

    def _leave(self, output: Any) -> None:
        position = self._open.pop()
        call, left = self.calls[position], self._next()
        tensors = tensors_of(output)
        call.outputs = _infos(tensors)
        call.saved_bytes = call.saved.current_bytes
        call.added_bytes = self.outside.saved.current_bytes - call.saved_before
        is_block = position == self._open_block
        for number, tensor in enumerate(tensors):
            self.lives.give_back(
                tensor, call.entered, left, Origin(producer=call.label, output=number), is_block
            )
        if is_block:
            self._open_block = None
            self._end_of_blocks = self._next()
        self._mark_nodes()

    @property
    def moments(self) -> list[int]:
        """Of the cuts: before each block call, and after the last."""
        return [*self.cut_moments, self._end_of_blocks] if self.cut_moments else []

    def _pack(self, tensor: torch.Tensor) -> Held | torch.Tensor:
        if self._paused or not is_counted(tensor, self._excluded):
            return tensor
        self._paused = True
        try:
            counts = (self.outside.saved, *(self.calls[position].saved for position in self._open))
            return Held(tensor, counts)
        finally:
            self._paused = False

    def _innermost(self) -> CallRecord:
        return self.calls[self._open[-1]] if self._open else self.outside

    def _next(self) -> int:
        self._moment += 1
        return self._moment

    def _mark_nodes(self) -> None:
        innermost = self._open[-1] if self._open else _OUTSIDE
        self._nodes.append((torch._C._autograd._get_sequence_nr(), innermost))

    def _call_of_node(self) -> CallRecord:
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else 0
        if self._nodes[0][0] <= number < self._end_of_nodes:
            position = self._nodes[bisect_right(self._nodes, number, key=lambda mark: mark[0]) - 1][1]
            self._of_last_node = self.calls[position] if position != _OUTSIDE else self.outside
        # Else a node that a node of the forward made while it ran (torch's reentrant checkpoint).
        return self._of_last_node


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that the operator's schema says it writes to."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[position] if position < len(args) else kwargs.get(argument.name))
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]


def _unpack(saved: Held | torch.Tensor) -> torch.Tensor:
    return saved.tensor if isinstance(saved, Held) else saved


def _infos(tensors: Sequence[torch.Tensor]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype) for tensor in tensors)
