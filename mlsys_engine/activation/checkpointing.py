"""Applies activation actions to a model in place: a block's forward is replaced, all names stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from mlsys_engine.activation.blocks import RECOMPUTE, RECOMPUTE_SEGMENTS, resolve
from mlsys_engine.activation.recompute import BufferCopies, Region, changed_buffers, run_recomputed
from mlsys_engine.errors import ConfigError


def checkpoint(model: nn.Module, policy: str = "full") -> nn.Module:
    """Makes the model's blocks recompute their activations in the backward, and returns the same model.

    Called once, before training; calling it again changes nothing. Parameter names, outputs and gradients
    stay bit-equal, with dropout, autocast, keyword arguments and any output structure; a block's forward runs
    twice a step. Raises ConfigError for an unknown policy. Undo it with `uncheckpoint`.
    """
    return apply_actions(model, resolve(model, policy))


def apply_actions(model: nn.Module, actions: Mapping[str, str]) -> nn.Module:
    """Applies `{block name: action}`, as `resolve` gives it and a Plan holds it. Returns the same model."""
    for name, action in actions.items():
        if action not in _FORWARDS:
            raise ConfigError(
                f"Block {name!r} was given the activation action {action!r}.",
                f"Known actions: {', '.join(_FORWARDS)}.",
                "Make the plan again with this version.",
            )
        try:
            model.get_submodule(name)
        except AttributeError:
            raise ConfigError(
                f"An activation action names the block {name!r}.",
                f"{type(model).__name__} has no module of that name.",
                "Make the plan again for this model.",
            ) from None
    for name, action in actions.items():
        block = model.get_submodule(name)
        if not isinstance(block.__dict__.get("forward"), RecomputedForward):
            block.forward = _FORWARDS[action](block, name or type(model).__name__)
    return model


def uncheckpoint(model: nn.Module) -> nn.Module:
    """Gives every block its own forward back, and returns the same model."""
    for block in model.modules():
        forward = block.__dict__.get("forward")
        if isinstance(forward, RecomputedForward):
            forward.remove()
    return model


class RecomputedForward:
    """A block's forward under a recompute frame. Without gradients it is the plain forward."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self._block, self._name = block, name
        # Set on the instance, if any.
        self._own_forward: Callable[..., Any] | None = block.__dict__.get("forward")
        # Part of the block -> the buffers that it was seen to write.
        self._written: dict[str, tuple[str, ...]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain(*args, **kwargs)
        return self._recomputed(Region(self._name, self._plain), args, kwargs, self._block_buffers())

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

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self._own_forward is not None:
            return self._own_forward(*args, **kwargs)
        return type(self._block).forward(self._block, *args, **kwargs)

    def remove(self) -> None:
        del self._block.forward
        if self._own_forward is not None:
            self._block.forward = self._own_forward


class SegmentedForward(RecomputedForward):
    """The forward of a Sequential of plain layers, in about sqrt(layers) segments; the last one is kept.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """

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
            input = self._recomputed(Region(part, run), (input,), {}, names)
        return _run_layers([layer for _, layer in layers[last:]], input)


def _run_layers(layers: list[nn.Module], value: Any) -> Any:
    for layer in layers:
        value = layer(value)
    return value


_FORWARDS = {RECOMPUTE: RecomputedForward, RECOMPUTE_SEGMENTS: SegmentedForward}
