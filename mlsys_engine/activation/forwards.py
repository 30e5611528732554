"""What stands in the place of a block's forward, one class an action."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from mlsys_engine.activation.compiling import uncompiled
from mlsys_engine.activation.offload import Offloader
from mlsys_engine.activation.recompute import (
    BufferCopies,
    Place,
    Region,
    changed_buffers,
    check_empty,
    is_cache,
    part_of,
    run_recomputed,
)
from mlsys_engine.activation.saving import Saving
from mlsys_engine.activation.segments import BlockChain


class ReplacedForward:
    """What stands in the place of a module's forward, and gives it back. Copies with the module."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self._name = block, name
        # Set on the instance, if any.
        self._own_forward: Callable[..., Any] | None = block.__dict__.get("forward")

    @uncompiled
    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self._own_forward is not None:
            return self._own_forward(*args, **kwargs)
        return type(self._block).forward(self._block, *args, **kwargs)

    def remove(self) -> None:
        """Puts the module's own forward back."""
        del self._block.forward
        if self._own_forward is not None:
            self._block.forward = self._own_forward


class RecomputedForward(ReplacedForward):
    """A block's forward under a recompute frame. Without gradients it is the plain forward."""

    def __init__(self, block: nn.Module, name: str, saving: Saving | None = None) -> None:
        super().__init__(block, name)
        self._saving = saving  # of what the last run before the backward keeps
        # Part of the block -> the buffers that it was seen to write.
        self._written: dict[str, tuple[str, ...]] = {}
        self._parts: dict[str, Any] = {}  # part of the block -> the native Part that its calls share

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        fn = self._plain if self._saving is None else self._saved
        region = self._region(self._name, fn, {"": self._block})
        return self._recomputed(region, args, kwargs, self._block_buffers())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": {}}

    def _saved(self, *args: Any, **kwargs: Any) -> Any:
        assert self._saving is not None
        return self._saving.run(self._plain, args, kwargs)

    @uncompiled
    def _region(self, name: str, fn: Callable[..., Any], modules: Mapping[str, nn.Module]) -> Region:
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = part_of(modules)
        return Region(name, fn, part=part)

    @uncompiled
    def _block_buffers(self) -> tuple[str, ...]:
        """The buffers that a call may write: all of a training block's, until one call has been watched."""
        if not self._block.training:
            return ()
        written = self._written.get(self._name)
        if written is None:
            written = tuple(name for name, _ in self._block.named_buffers())
            if not written:
                self._written[self._name] = ()
        return written

    @uncompiled
    def _recomputed(
        self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any], buffers: tuple[str, ...]
    ) -> Any:
        """Runs the region recomputed. The first training call finds out which of `buffers` it writes."""
        if not buffers:
            return run_recomputed(region, args, kwargs)
        written = self._written.get(region.name)
        if written is not None:
            return run_recomputed(region, args, kwargs, BufferCopies(self._block, written))
        before = {name: self._block.get_buffer(name).detach().clone() for name in buffers}
        result = run_recomputed(region, args, kwargs, BufferCopies(self._block, buffers))
        self._written[region.name] = changed_buffers(self._block, before)
        return result


class ChainedForward(RecomputedForward):
    """The forward of a block that is run again together with others."""

    def __init__(
        self, block: nn.Module, name: str, chain: BlockChain, position: int, saving: Saving | None
    ) -> None:
        super().__init__(block, name, saving)
        self._chain, self._position = chain, position

    @uncompiled
    def _region(self, name: str, fn: Callable[..., Any], modules: Mapping[str, nn.Module]) -> Region:
        region = super()._region(name, fn, modules)
        region.place = Place(self._chain.native(), self._position)
        return region


class KeptForward(ReplacedForward):
    """The plain forward of a block among others that keep less.

    Where others are run again no generation cache reaches it: it would fill the cache, and they refuse a
    filled one. Where others offload, what they gave away is let go once it is written.
    """

    def __init__(
        self, block: nn.Module, name: str, takes_cache: bool = False, offloader: Offloader | None = None
    ) -> None:
        super().__init__(block, name)
        self._takes_cache, self._offloader = takes_cache, offloader

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            if self._offloader is not None:
                self._offloader.begin_block()
            if not self._takes_cache:
                args = tuple(map(_no_cache, args))
                kwargs = {name: _no_cache(value) for name, value in kwargs.items()}
        return self._plain(*args, **kwargs)


class SavingForward(ReplacedForward):
    """A block's forward, run once, of which less stays for its backward."""

    def __init__(self, block: nn.Module, name: str, saving: Saving) -> None:
        super().__init__(block, name)
        self._saving = saving

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        return self._saving.run(self._plain, args, kwargs)


class SegmentedForward(RecomputedForward):
    """The forward of a Sequential of plain layers, in about sqrt(layers) segments; the last one is kept.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """

    @uncompiled
    def __call__(self, input: Any) -> Any:  # the parameter's name is nn.Sequential's
        if not torch.is_grad_enabled():
            return self._plain(input)
        layers = list(self._block.named_children())
        size = math.ceil(len(layers) / round(math.sqrt(len(layers))))
        last = (len(layers) - 1) // size * size
        for start in range(0, last, size):
            segment = layers[start : start + size]
            names = tuple(
                f"{name}.{leaf}"
                for name, layer in segment
                for leaf, _ in layer.named_buffers()
                if layer.training
            )
            part = f"{self._name}[{start}:{start + size}]"
            run = partial(_run_layers, [layer for _, layer in segment])
            input = self._recomputed(self._region(part, run, dict(segment)), (input,), {}, names)
        return _run_layers([layer for _, layer in layers[last:]], input)


def _no_cache(value: Any) -> Any:
    if not is_cache(value):
        return value
    check_empty(value)
    return None


def _run_layers(layers: list[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value
