"""One forward pass on fake tensors: which modules run, in which order, with which output shapes.

Nothing real is computed and nothing real changes. Parameters and buffers are swapped for fakes, so BatchNorm
counts no batch; random operations on fakes draw nothing (and the generator is put back all the same); what a
module stores on itself during the pass is put back afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from mlsys_engine.trace.values import Execution

Call = Callable[[nn.Module, Any], Any]


def call_plainly(model: nn.Module, sample: Any) -> Any:
    """The default convention: a mapping as keywords, a tuple or list as positions, anything else as it is."""
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, list | tuple) else model(sample)


def execute(model: nn.Module, sample: Any, call: Call = call_plainly) -> tuple[Execution, ...]:
    """Runs `call(model, sample)` on fakes and returns the modules in order of their first call.

    Raises whatever the model raises: data-dependent control flow cannot run without data.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    order: dict[str, tuple[tuple[int, ...], ...]] = {}
    with _attributes_restored(model), torch.random.fork_rng(devices=[]), _recording(model, order):
        fakes = {
            name: _fake(mode, tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        fake_sample = tree_map(
            lambda leaf: _fake(mode, leaf) if isinstance(leaf, torch.Tensor) else leaf, _plain(sample)
        )
        with mode, torch.no_grad(), _swapped(model, fakes):
            call(model, fake_sample)
    return tuple(Execution(fqn=fqn, output_shapes=shapes) for fqn, shapes in order.items())


def _fake(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    return mode.from_tensor(tensor.detach(), static_shapes=True)


def _plain(sample: Any) -> Any:
    # Mappings that pytrees do not know (transformers' BatchEncoding) become dictionaries.
    return dict(sample) if isinstance(sample, Mapping) else sample


@contextmanager
def _swapped(model: nn.Module, fakes: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Puts fakes in place of parameters and buffers; `_attributes_restored` puts the real ones back."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for module in model.modules():
        # Copies: the dictionaries themselves are what is restored afterwards.
        parameters = {key: _swap(value, names, fakes) for key, value in module._parameters.items()}
        buffers = {key: _swap(value, names, fakes) for key, value in module._buffers.items()}
        module.__dict__["_parameters"], module.__dict__["_buffers"] = parameters, buffers
    yield


def _swap(
    value: torch.Tensor | None, names: Mapping[int, str], fakes: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    return None if value is None else fakes[names[id(value)]]


@contextmanager
def _recording(model: nn.Module, order: dict[str, tuple[tuple[int, ...], ...]]) -> Iterator[None]:
    handles = []
    for fqn, module in model.named_modules():

        def enter(module: nn.Module, args: Any, fqn: str = fqn) -> None:
            order.setdefault(fqn, ())

        def leave(module: nn.Module, args: Any, output: Any, fqn: str = fqn) -> None:
            if not order[fqn]:
                leaves = tree_leaves(output)
                order[fqn] = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Puts every module's attributes back to the objects they were (the objects are not copied)."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
