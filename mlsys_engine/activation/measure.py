"""Runs a model or a block of it for its costs alone: training does not notice.

Gradients go to nobody, and random states and buffers are put back afterwards.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mlsys_engine.activation.recompute import is_cache
from mlsys_engine.memory import SavedActivationMeter

Call = Callable[[], Any]  # runs the model once and returns what it returns
Way = Callable[[], AbstractContextManager[None]]  # in which a block runs in another way


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """One call of a block, seen while the model ran; bytes are those saved for the backward at that time."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    takes_cache: bool  # of keys and values, for generation
    chained: bool  # one of its inputs is the very tensor that the block before it returned
    input_bytes: int  # of that input; of all inputs when there is none
    bytes_before: int  # with the inputs, whether they were saved already or not
    bytes_after: int  # with the outputs


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One forward and backward of the whole model."""

    calls: tuple[BlockCall, ...]
    bytes_at_end: int  # saved when the forward had ended
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """What one block takes: the least of some runs, as noise only adds."""

    forward_s: float
    backward_s: float
    backward_peak_bytes: int  # computed again or unpacked in the backward, besides what was saved


def observe(model: nn.Module, names: Sequence[str], call: Call) -> Observation:
    """Runs forward and backward once under the meter and writes down what the named blocks were given."""
    calls: list[BlockCall] = []
    open_calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], bool, bool, int, int]] = {}
    last_outputs: list[torch.Tensor] = []
    handles = []
    with _unchanged(model), SavedActivationMeter(model) as meter:
        for name in names:

            def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                inputs = tensors_of((args, kwargs))
                linked = [tensor for tensor in inputs if any(tensor is output for output in last_outputs)]
                before = meter.current_bytes + _missing(meter, inputs)
                own = _num_bytes(linked or inputs)
                caches = any(is_cache(leaf) for leaf in pytree.tree_leaves((args, kwargs), is_leaf=is_cache))
                open_calls[name] = (*_as_leaves((args, kwargs)), caches, bool(linked), own, before)

            def leave(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                args, kwargs, caches, chained, own, before = open_calls.pop(name)
                last_outputs[:] = tensors_of(output)
                calls.append(
                    BlockCall(
                        name=name,
                        args=args,
                        kwargs=kwargs,
                        takes_cache=caches,
                        chained=chained,
                        input_bytes=own,
                        bytes_before=before,
                        bytes_after=meter.current_bytes + _missing(meter, last_outputs),
                    )
                )

            block = model.get_submodule(name)
            handles += [
                block.register_forward_pre_hook(enter, with_kwargs=True),
                block.register_forward_hook(leave, with_kwargs=True),
            ]
        try:
            started = time.perf_counter()
            loss = scalar(call())
            at_end = meter.current_bytes
            if calls:  # what the last block returned may be of no use to the backward
                unused = _missing(meter, last_outputs)
                calls[-1] = replace(calls[-1], bytes_after=calls[-1].bytes_after - unused)
        finally:
            for handle in handles:
                handle.remove()
        last_outputs.clear()
        _backward(loss, model)
        seconds = time.perf_counter() - started
        return Observation(
            calls=tuple(calls), bytes_at_end=at_end, peak_bytes=meter.peak_bytes, seconds=seconds
        )


def peak_and_seconds(model: nn.Module, call: Call, repeats: int = 1) -> tuple[int, float]:
    """The peak of saved bytes over a forward and backward, and the median seconds of `repeats` of them."""
    seconds = []
    with _unchanged(model):
        with SavedActivationMeter(model) as meter:
            _backward(scalar(call()), model)
        for _ in range(repeats):
            started = time.perf_counter()
            _backward(scalar(call()), model)
            _synchronise(model)
            seconds.append(time.perf_counter() - started)
    return meter.peak_bytes, statistics.median(seconds) if seconds else 0.0


def time_block(
    block: nn.Module, call: BlockCall, ways: Mapping[str, Way], repeats: int = 5
) -> dict[str, Times]:
    """What the block's forward and backward take on the inputs of that call, for each way to run it.

    The ways take turns, so that what else the machine does meets all of them. One run warms up.
    """
    peaks: dict[str, int] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with _unchanged(block):
        for name, way in ways.items():
            with way(), SavedActivationMeter(block) as meter:
                *_, saved_bytes = _run_block(block, call, meter)
                peaks[name] = meter.peak_bytes - saved_bytes
        for _ in range(repeats):
            for name, way in ways.items():
                with way():
                    forward_s, backward_s, _ = _run_block(block, call)
                seconds[name].append((forward_s, backward_s))
    return {
        name: Times(
            forward_s=min(forward_s for forward_s, _ in seconds[name]),
            backward_s=min(backward_s for _, backward_s in seconds[name]),
            backward_peak_bytes=peaks[name],
        )
        for name in ways
    }


def _run_block(
    block: nn.Module, call: BlockCall, meter: SavedActivationMeter | None = None
) -> tuple[float, float, int]:
    """Seconds of forward and backward, and the bytes that the meter counts between them."""
    args, kwargs = _as_leaves((call.args, call.kwargs))
    started = time.perf_counter()
    output = block(*args, **kwargs)
    _synchronise(block)
    between = time.perf_counter()
    saved_bytes = 0 if meter is None else meter.current_bytes
    outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
    wanted = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
    wanted += [parameter for parameter in block.parameters() if parameter.requires_grad]
    if outputs and wanted:
        ones = [torch.ones_like(output) for output in outputs]
        torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
    _synchronise(block)
    return between - started, time.perf_counter() - between, saved_bytes


def likeness(block: nn.Module, call: BlockCall) -> object:
    """Equal for blocks that do the same work: by structure, shapes and types, not by values."""
    return (
        type(block),
        repr(block),
        block.training,
        tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters()),
        tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors_of((call.args, call.kwargs))),
    )


def scalar(output: Any) -> torch.Tensor:
    """Something to start the backward from: the output's own loss, or the sum of what needs a gradient."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss.sum()
    parts = [tensor.float().sum() for tensor in tensors_of(output) if tensor.requires_grad]
    return torch.stack(parts).sum()


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in any structure, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _backward(loss: torch.Tensor, model: nn.Module) -> None:
    # Not loss.backward(): that would add to gradients and call whoever waits for them.
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)


def _synchronise(module: nn.Module) -> None:
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device.type == "cuda":
        torch.cuda.synchronize(parameter.device)


def _as_leaves(value: Any) -> Any:
    """The same structure with tensors that belong to no graph, but want gradients where they did.

    Generation caches, which a forward fills, are left out as in a checkpointed call.
    """

    def leaf_of(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().requires_grad_(leaf.requires_grad)
        return None if is_cache(leaf) else leaf

    return pytree.tree_map(leaf_of, value, is_leaf=is_cache)


def _missing(meter: SavedActivationMeter, tensors: Sequence[torch.Tensor]) -> int:
    return _num_bytes([tensor for tensor in tensors if not meter.counts(tensor)])


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    buffers = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
