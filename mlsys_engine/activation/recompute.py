"""Runs one module call so that its backward recomputes it: the Python side of the native recompute frame.

The second run must be the first again, bit for bit. So a call remembers what it depends on besides its
inputs: the random state of the devices involved and the autocast setting (in native code), and the buffers
that the block was seen to write (BatchNorm's running statistics, a spectral norm's vectors): the second run
works on copies of their old values, so that it is not counted as a second training step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mlsys_engine.activation.checksum import checksum
from mlsys_engine.activation.compiling import uncompiled
from mlsys_engine.errors import ConfigError, MlsysError
from mlsys_engine.memory import current_observer
from mlsys_engine.native import load_activation


class RecomputeMismatchError(MlsysError, RuntimeError):
    """A block did something else when it was run again: its gradients would be wrong."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"Activation checkpointing: {what}. A checkpointed block must do the same in both runs: nothing "
            f"in it may depend on counters, time or random sources other than torch's, and none of its "
            f"kernels may give other bits each time (torch.use_deterministic_algorithms(True) avoids those). "
            f"Make its forward depend on its inputs alone, or leave this block out with apply_actions."
        )


class _StopRecompute(BaseException):
    """Ends a recomputation once the last tensor that the backward needs is there.

    No Exception, which a block may catch to try something else.
    """


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands in a chain of blocks that are recomputed together; by default in none."""

    chain: Any = None  # the native FrameChain
    position: int = 0


class BufferCopies:
    """The values that a part of a module's buffers have before its first run, for the second one.

    The second run writes to copies: the module's own buffers, and their version counters, stay untouched.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module = module
        self._values = {name: module.get_buffer(name).clone() for name in names}
        self._originals: dict[str, torch.Tensor] = {}

    def enter(self) -> None:
        for name, value in self._values.items():
            owner, _, leaf = name.rpartition(".")
            self._originals[name] = self._module.get_buffer(name)
            self._module.get_submodule(owner)._buffers[leaf] = value.clone()

    def exit(self) -> None:
        for name, original in self._originals.items():
            owner, _, leaf = name.rpartition(".")
            self._module.get_submodule(owner)._buffers[leaf] = original


_NO_PLACE = Place()


@dataclasses.dataclass(slots=True)
class Region:
    """What is recomputed: `fn`, a part of the model that users know as `name`."""

    name: str
    fn: Callable[..., Any]
    place: Place = _NO_PLACE
    part: Any = None  # the native Part that all calls share; by default one of their own


@uncompiled
def run_recomputed(
    region: Region, args: tuple[Any, ...], kwargs: dict[str, Any], buffers: BufferCopies | None = None
) -> Any:
    """Runs the region and keeps its inputs alone for the backward, which runs it again."""
    native, place = load_activation(), region.place
    part = native.Part([]) if region.part is None else region.part
    what = (_hooks(), region.name, region.fn, part, place.chain, place.position)
    return native.run(*what, args, kwargs, buffers, current_observer())


@uncompiled
def part_of(modules: Mapping[str, nn.Module]) -> Any:
    """What all calls of a part of a model share (native), for the part that consists of these modules.

    Parameters of modules that FSDP shards on their own are left to it: it changes them while the part runs.
    """
    places: list[tuple[dict[str, Any], str, str, bool]] = []
    for prefix, module in modules.items():
        managed: list[str] = []
        for path, child in module.named_modules(prefix=prefix):
            if child is not module and any("FSDPModule" in kind.__name__ for kind in type(child).__mro__):
                managed.append(f"{path}.")
            if f"{path}.".startswith(tuple(managed)):
                continue
            start = f"{path}." if path else ""
            places += [(child._parameters, leaf, start + leaf, True) for leaf in child._parameters]
            places += [(child._buffers, leaf, start + leaf, False) for leaf in child._buffers]
    return load_activation().Part(places)


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
@uncompiled
def _hooks() -> Any:
    return load_activation().Hooks(
        open=_open,
        stop_recompute=_StopRecompute,
        mismatch_error=RecomputeMismatchError,
        transform_error=transform_error,
        checksum=checksum,
    )


def transform_error(name: str) -> ConfigError:
    """What is raised when a block of this name is called inside torch.func.grad, vmap or the like."""
    return ConfigError(
        f"The checkpointed block {name!r} was called inside a transformation of torch.func.",
        "A block whose activations are computed again needs torch.autograd's backward.",
        "Call mls.activation.uncheckpoint(model) before torch.func, or use torch.autograd.",
    )


@uncompiled
def _open(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """The parts of an argument that may hold tensors, and how to put it together; None for a plain value.

    An empty Hugging Face generation cache becomes None: a second run would append to it again.
    """
    kind = type(value)
    if is_cache(value):
        check_empty(value)
        return [], lambda _: None
    if kind in pytree.SUPPORTED_NODES or pytree.is_namedtuple_class(kind):
        leaves, spec = pytree.tree_flatten(value)
        return leaves, lambda parts: pytree.tree_unflatten(parts, spec)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [getattr(value, name) for name in names], functools.partial(_with_fields, value, names)
    return None


def is_cache(value: Any) -> bool:
    """Whether it is a Hugging Face generation cache, which a block's forward extends."""
    return hasattr(type(value), "get_seq_length") and not isinstance(value, nn.Module)


def check_empty(cache: Any) -> None:
    """Refuses a cache that holds keys and values; raises ConfigError."""
    if cache.get_seq_length():
        raise ConfigError(
            f"A checkpointed block got a filled {type(cache).__name__} while gradients are on.",
            "A recomputed block cannot extend a cache of keys and values.",
            "Train with use_cache=False, or generate under torch.no_grad().",
        )


def _with_fields(original: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    made = copy.copy(original)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # frozen dataclasses too
    return made
