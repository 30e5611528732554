"""Runs one module call so that its backward recomputes it: the Python side of the native recompute frame.

The second run must be the first again, bit for bit. So a call remembers what it depends on besides its
inputs: the random state of the devices involved, the autocast setting, and the buffers that the block was
seen to write (BatchNorm's running statistics, a spectral norm's vectors): the second run works on copies of
their old values, so that it is not counted as a second training step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mlsys_engine.errors import MlsysError
from mlsys_engine.memory import current_observer
from mlsys_engine.native import load_activation


class RecomputeMismatchError(MlsysError, RuntimeError):
    """A block did something else when it was run again: its gradients would be wrong."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"Activation checkpointing: {what}. A checkpointed block must do the same in both runs: nothing "
            f"in it may depend on counters, time or random sources other than torch's. Make its forward "
            f"depend on its inputs alone, or leave this block out with apply_actions."
        )


class _StopRecompute(Exception):
    """Ends a recomputation once the last tensor that the backward needs is there."""


class _SaveInputs(torch.autograd.Function):
    """Keeps a block's tensor inputs as autograd keeps any saved tensor.

    So an enclosing frame, a meter or a packing hook sees them, and a nested block's inputs are not held alive
    while the enclosing block waits for its recomputation. Returns an empty tensor: its node is the handle.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise AssertionError("the handle takes no part in the backward")


@dataclass(frozen=True)
class Region:
    """What is recomputed: `fn`, a part of `module` called `name`, which writes these of its buffers."""

    name: str
    module: nn.Module
    fn: Callable[..., Any]
    written_buffers: tuple[str, ...]


class Recomputation:
    """How to run a region a second time, with everything that the first run depended on."""

    def __init__(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._region = region
        leaves, self._tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self._others = [
            None if is_tensor else leaf for leaf, is_tensor in zip(leaves, self._is_tensor, strict=True)
        ]
        # requires_grad of the anchor makes autograd keep the node even when no input needs a gradient.
        anchor = torch.empty(0, requires_grad=True)
        self._inputs = _SaveInputs.apply(anchor, *tensors).grad_fn
        self._needs_grad = [tensor.requires_grad for tensor in tensors]
        self._devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
        self._device_type = "cuda" if self._devices else "cpu"
        self._cpu_rng = torch.get_rng_state()
        self._cuda_rng = [torch.cuda.get_rng_state(device) for device in self._devices]
        self._autocast = [_AutocastState(kind) for kind in {"cpu", self._device_type}]
        self._buffers = {name: region.module.get_buffer(name).clone() for name in region.written_buffers}

    def __call__(self, frame: Any) -> None:
        tensors = [
            saved.detach().requires_grad_(needs_grad)
            for saved, needs_grad in zip(self._inputs.saved_tensors, self._needs_grad, strict=True)
        ]
        supply = iter(tensors)
        leaves = [
            next(supply) if is_tensor else other
            for is_tensor, other in zip(self._is_tensor, self._others, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_random_state(self._cpu_rng, self._devices, self._cuda_rng))
            stack.enter_context(_buffers_replaced(self._region.module, self._buffers))
            for state in self._autocast:
                stack.enter_context(state.restored())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(contextlib.suppress(_StopRecompute))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(frame.store, _refuse_inner_unpack))
            self._region.fn(*args, **kwargs)


def run_recomputed(region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the region and keeps its inputs alone for the backward, which runs it again."""
    native = load_activation()
    frame = native.Frame(region.name, Recomputation(region, args, kwargs), current_observer(), _hooks(native))
    with torch.autograd.graph.saved_tensors_hooks(frame.pack, native.unpack):
        return region.fn(*args, **kwargs)


def changed_buffers(module: nn.Module, before: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The buffers whose values differ from those in `before`, by name."""
    return tuple(
        name
        for name, value in before.items()
        if not torch.equal(_bits(module.get_buffer(name)), _bits(value))
    )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # so that nan equals nan


@functools.cache
def _hooks(native: ModuleType) -> Any:
    return native.Hooks(
        current_graph_task=torch._C._current_graph_task_id,
        stop_recompute=_StopRecompute,
        mismatch_error=RecomputeMismatchError,
    )


def _refuse_inner_unpack(_: object) -> torch.Tensor:
    raise RecomputeMismatchError("a backward ran inside a block's own recomputation")


class _AutocastState:
    """The autocast setting of one device type, as it is now."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._enabled = torch.is_autocast_enabled(device_type)
        self._dtype = torch.get_autocast_dtype(device_type)
        self._cache = torch.is_autocast_cache_enabled()

    def restored(self) -> torch.autocast:
        return torch.autocast(self._device_type, self._dtype, self._enabled, self._cache)


@contextlib.contextmanager
def _random_state(cpu: torch.Tensor, devices: list[int], cuda: list[torch.Tensor]) -> Iterator[None]:
    """Runs the body with these random states and puts the present ones back afterwards."""
    present_cpu = torch.get_rng_state()
    present_cuda = [torch.cuda.get_rng_state(device) for device in devices]
    torch.set_rng_state(cpu)
    for device, state in zip(devices, cuda, strict=True):
        torch.cuda.set_rng_state(state, device)
    try:
        yield
    finally:
        torch.set_rng_state(present_cpu)
        for device, state in zip(devices, present_cuda, strict=True):
            torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def _buffers_replaced(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Lets the body write to copies: the module's own buffers, and their version counters, stay untouched."""
    originals = {}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        originals[name] = (module.get_submodule(owner), leaf, module.get_buffer(name))
        module.get_submodule(owner)._buffers[leaf] = value.clone()
    try:
        yield
    finally:
        for owner_module, leaf, buffer in originals.values():
            owner_module._buffers[leaf] = buffer
