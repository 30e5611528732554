"""What of a model has a stage: its units, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline.partial.refusals import PartialForwardError
from mlsys_engine.pipeline.partial.skeletons import guarded
from mlsys_engine.trace.blocks import block_names
from mlsys_engine.trace.execution import Call, call_plainly
from mlsys_engine.trace.fakes import attributes_restored, buffers_restored, faked
from mlsys_engine.trace.structure import map_tensors, tensors_of


@dataclass(frozen=True, kw_only=True)
class Units:
    """What has a stage: the blocks, and the outermost modules with parameters beside them.

    `names` are in order of first execution, and `parameters` has the parameters of each by their first FQN.
    `escapes` are modules inside units whose outputs are read outside, through hooks. `loose` are
    parameters of no unit, which live on stage 0.
    """

    names: tuple[str, ...]
    blocks: tuple[str, ...]
    escapes: tuple[str, ...]
    parameters: Mapping[str, tuple[str, ...]]
    loose: tuple[str, ...]


def find_units(model: nn.Module, sample: Any, call: Call = call_plainly) -> Units:
    """Watches one forward, without changing buffers, attributes or random states; called when a plan is made.

    It runs on fakes. Where the model cannot run without data the output of a module is assumed to be like its
    first input, and one forward on the real tensors must prove that. Raises ConfigError for a model with
    nothing to place and where the proof fails, and PartialForwardError for a value that leaves a unit in
    a way that another stage could not follow.
    """
    candidates = _candidates(model)
    inner = {
        f"{unit}.{name}": module
        for unit in candidates
        for name, module in model.get_submodule(unit).named_modules()
        if name
    }
    watch = _Watch()
    with ExitStack() as stack:
        fake = stack.enter_context(faked(model, sample))
        assumed = stack.enter_context(guarded(inner))
        stack.enter_context(watch.watching(model, candidates, inner))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(watch)
        call(model, fake)
    if assumed:
        _prove(model, sample, call, {name: inner[name] for name in assumed})
    if not watch.order:
        raise ConfigError(
            f"{type(model).__name__} was to be divided into stages.",
            "No module with parameters was called in its forward.",
            "Give a sample with which the model runs its blocks.",
        )
    first = _first_names(model)
    parameters = {
        unit: tuple(dict.fromkeys(first[id(p)] for p in model.get_submodule(unit).parameters()))
        for unit in watch.order
    }
    placed = {name for names in parameters.values() for name in names}
    blocks = set(block_names(model))
    return Units(
        names=tuple(watch.order),
        blocks=tuple(name for name in watch.order if name in blocks),
        escapes=tuple(watch.escapes),
        parameters=parameters,
        loose=tuple(name for name in first.values() if name not in placed),
    )


def parameter_stages(model: nn.Module, stages: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The stages that use each parameter, ascending, by its first FQN; a tied one has several.

    Parameters of no unit live on stage 0, and so do those of a unit without a stage.
    """
    first = _first_names(model)
    found: dict[str, set[int]] = {name: set() for name in first.values()}
    for unit, stage in stages.items():
        for parameter in model.get_submodule(unit).parameters():
            found[first[id(parameter)]].add(stage)
    return {name: tuple(sorted(used)) or (0,) for name, used in found.items()}


def _first_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _candidates(model: nn.Module) -> list[str]:
    """The blocks, and the outermost modules that have parameters and hold no block; each module once."""
    blocks = block_names(model)
    above = {block.rsplit(".", depth)[0] for block in blocks for depth in range(1, block.count(".") + 1)}
    found: list[str] = []
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            full = f"{path}.{name}" if path else name
            if full in above:
                walk(full, child)
            elif id(child) not in seen and next(child.parameters(), None) is not None:
                seen.add(id(child))
                if isinstance(child, nn.ModuleList | nn.ModuleDict):  # never called itself
                    walk(full, child)
                else:
                    found.append(full)

    walk("", model)
    return found


class _Watch(TorchFunctionMode):
    """Notes the order of units, and which values made inside one are read outside without being "
    "its output."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.escapes: list[str] = []
        self._inside: dict[int, str] = {}  # value -> the module in a unit that returned it
        self._made: set[int] = set()  # by operations inside units
        self._returned: set[int] = set()
        self._kept: list[Any] = []  # so that ids stay what they are
        self._unit = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._unit:
            for tensor in tensors_of((args, kwargs or {})):
                self._read(tensor)
        output = func(*args, **(kwargs or {}))
        if self._unit:
            found = tensors_of(output)
            self._made.update(map(id, found))
            self._kept.extend(found)
        return output

    def _read(self, tensor: torch.Tensor) -> None:
        if id(tensor) in self._returned:
            return
        name = self._inside.get(id(tensor))
        if name is None:
            if id(tensor) in self._made and tensor.grad_fn is not None:
                raise PartialForwardError(
                    f"A tensor of shape {tuple(tensor.shape)} leaves a block by an attribute or a list.",
                    "Other stages can follow what a block returns, and what a module inside it returns.",
                    "Let the block return it, or compute it in a named module inside the block.",
                )
        elif name not in self.escapes:
            self.escapes.append(name)

    @contextmanager
    def watching(
        self, model: nn.Module, units: Sequence[str], inner: Mapping[str, nn.Module]
    ) -> Iterator[None]:
        handles = []
        for name in units:
            unit = model.get_submodule(name)
            handles.append(unit.register_forward_pre_hook(self._entering(name), prepend=True))
            handles.append(unit.register_forward_hook(self._leaving, prepend=True))
        for name, module in inner.items():
            handles.append(module.register_forward_hook(self._noting(name), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._unit = name
            if name not in self.order:
                self.order.append(name)

        return enter

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._unit = ""
        found = tensors_of(output)
        self._returned.update(map(id, found))
        self._kept.extend(found)

    def _noting(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tensors_of(output):
                self._inside.setdefault(id(tensor), name)
                self._kept.append(tensor)

        return note


def _prove(model: nn.Module, sample: Any, call: Call, modules: Mapping[str, nn.Module]) -> None:
    """Runs the model on data, and compares these modules' outputs with their first inputs."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"{', '.join(modules)} cannot run without data, and the model is on the meta device.",
            "One forward on real tensors shows what such modules return.",
            "Give a materialised model when the plan is made.",
        )

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = tensors_of((args, kwargs))[0]
            if not isinstance(output, torch.Tensor) or (output.shape, output.dtype) != (
                given.shape,
                given.dtype,
            ):
                raise ConfigError(
                    f"{name} cannot run without data, and what it returns is not like its first input.",
                    "A stage must know what the blocks of other stages return without running them.",
                    "Place the modules that read it in the same block.",
                )

        return hook

    handles = [
        module.register_forward_hook(compare(name), with_kwargs=True) for name, module in modules.items()
    ]
    own = map_tensors(sample, lambda tensor: tensor.detach())
    try:
        with attributes_restored(model), buffers_restored(model), torch.no_grad():
            call(model, own)
    finally:
        for handle in handles:
            handle.remove()
