"""A model and a sample with fake tensors in their places: nothing real is computed and nothing real changes.

Parameters and buffers are swapped for fakes, so BatchNorm counts no batch; random operations on fakes draw
nothing; what a module stores on itself meanwhile is put back afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mlsys_engine.trace.structure import map_tensors, tensors_of

_CONTAINERS = (list, dict, OrderedDict, set)  # torch keeps hooks in the third


class FakeMode(FakeTensorMode):
    """Also runs what torch's own mode refuses although the operator itself runs: a grouped product of other
    types than bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_mm(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def _grouped_mm(
    first: torch.Tensor,
    second: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A result of the right shape: both are stacks of matrices, or rows (columns) that `offs` divides."""
    shape = [first.shape[-2], second.shape[-1]]
    if first.dim() == 3 and second.dim() == 3:
        shape.insert(0, first.shape[0])
    elif first.dim() == 2 and second.dim() == 2 and offs is not None:
        shape.insert(0, offs.shape[0])
    return first.new_empty(shape, dtype=out_dtype or first.dtype)


@contextmanager
def faked(model: nn.Module, sample: Any) -> Iterator[Any]:
    """Within it the model's parameters and buffers are fakes; yields the sample with fakes.

    Meta tensors become fakes of the device that the others are on, or of the CPU: an operator may be another
    one on meta than where it will run (attention), and saves other tensors then.
    """
    mode = FakeMode(allow_non_fake_inputs=True)
    named = (*model.named_parameters(), *model.named_buffers())
    real = [tensor.device for tensor in (*(tensor for _, tensor in named), *tensors_of(sample))]
    device = next((each for each in real if each.type != "meta"), torch.device("cpu"))
    with attributes_restored(model), torch.random.fork_rng(devices=[]):
        fakes = {name: _fake(mode, tensor, device) for name, tensor in named}
        fake_sample = map_tensors(sample, lambda tensor: _fake(mode, tensor, device))
        _swap_all(model, fakes)
        with mode:
            yield fake_sample


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # A fake holds a meta tensor, so a real one serves as it is.
    made = (
        FakeTensor(mode, tensor.detach(), device)
        if tensor.is_meta
        else mode.from_tensor(tensor.detach(), static_shapes=True)
    )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.requires_grad_(tensor.requires_grad)


def _swap_all(model: nn.Module, fakes: Mapping[str, torch.Tensor]) -> None:
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def swap(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else fakes[names[id(value)]]

    for module in model.modules():
        # Copies: the dictionaries themselves are what is restored afterwards.
        for kind in ("_parameters", "_buffers"):
            module.__dict__[kind] = {key: swap(value) for key, value in module.__dict__[kind].items()}


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Puts every module's attributes back to the objects they were, and lists, dictionaries and sets among
    them to what they held. Hooks, too: a library that adds its own in a first forward notes that in an
    attribute, and would add them again. The same for what stands in the place of a forward (activation
    checkpointing); other objects are not copied."""
    stand_ins = [module.__dict__.get("forward") for module in model.modules()]
    owners = [*model.modules(), *(each for each in stand_ins if hasattr(each, "__dict__"))]
    before = []
    for owner in owners:
        refills = [_refill(value) for value in owner.__dict__.values() if type(value) in _CONTAINERS]
        before.append((owner.__dict__, dict(owner.__dict__), refills))
    try:
        yield
    finally:
        for attributes, values, refills in before:
            attributes.clear()
            attributes.update(values)
            for refill in refills:
                refill()


def _refill(value: Any) -> Callable[[], None]:
    held = value.copy()

    def refill() -> None:
        value.clear()
        value.extend(held) if isinstance(value, list) else value.update(held)

    return refill


@contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Copies the buffers' values and the random states, and puts them back."""
    values = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    with torch.random.fork_rng(devices=_cuda_devices(list(model.parameters()))):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in values.items():
                    buffer.copy_(value)


def _cuda_devices(tensors: Sequence[torch.Tensor]) -> list[int]:
    return sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
