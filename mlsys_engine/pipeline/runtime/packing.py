"""Several tensors as one message, and its layout.

A message begins with some 64-bit numbers for each tensor: whether it is there and requires a gradient, and
its strides. The generator's state follows where there is one, then the tensors at multiples of 64 bytes.
Strides are kept because kernels choose their summation by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

_ALIGNMENT = 64
_ABSENT, _PLAIN, _REQUIRES_GRAD = 0, 1, 2
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


@dataclass(frozen=True)
class Layout:
    """Shapes and types of a message's tensors, and the bytes of generator state before them."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    state_bytes: int = 0

    @cached_property
    def head_bytes(self) -> int:
        return _aligned(8 * sum(1 + len(shape) for shape, _ in self.tensors))

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where each tensor begins, in bytes, and at last the size of the message."""
        at, places = self.head_bytes + _aligned(self.state_bytes), []
        for shape, dtype in self.tensors:
            places.append(at)
            at += _aligned(math.prod(shape) * dtype.itemsize)
        return (*places, max(at, 1))

    @property
    def num_bytes(self) -> int:
        return self.places[-1]

    def encode(self) -> list[int]:
        """The layout as numbers, for a receiver that does not know it."""
        numbers = [self.state_bytes, len(self.tensors)]
        for shape, dtype in self.tensors:
            numbers += [_DTYPES.index(dtype), len(shape), *shape]
        return numbers

    @classmethod
    def decode(cls, numbers: Sequence[int]) -> Layout:
        """The layout that `encode` wrote."""
        rest = list(numbers[2:])
        tensors = []
        for _ in range(numbers[1]):
            dtype, ndim = rest[:2]
            tensors.append((tuple(rest[2 : 2 + ndim]), _DTYPES[dtype]))
            rest = rest[2 + ndim :]
        return cls(tuple(tensors), numbers[0])


@dataclass(frozen=True)
class Message:
    """What went from one stage to a neighbour: tensors without history, None for one that is not there."""

    tensors: tuple[torch.Tensor | None, ...]
    state: torch.Tensor | None = None  # uint8, of the random number generators, on the CPU


def layout_of(tensors: Sequence[torch.Tensor], state: torch.Tensor | None = None) -> Layout:
    """The layout of a message of these tensors."""
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    return Layout(shapes, 0 if state is None else state.numel())


@torch.no_grad()
def pack(message: Message, layout: Layout, device: torch.device) -> torch.Tensor:
    """The message as one tensor of bytes on `device`."""
    buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
    head: list[int] = []
    for tensor, (shape, _), place in zip(message.tensors, layout.tensors, layout.places, strict=False):
        if tensor is None:
            head += [_ABSENT, *([0] * len(shape))]
            continue
        strides = _strides(tensor)
        head += [_REQUIRES_GRAD if tensor.requires_grad else _PLAIN, *strides]
        _view(buffer, place, tensor.shape, strides, tensor.dtype).copy_(tensor)
    if head:
        buffer[: 8 * len(head)].view(torch.int64).copy_(torch.tensor(head))
    if message.state is not None:
        buffer[layout.head_bytes : layout.head_bytes + layout.state_bytes].copy_(message.state)
    return buffer


def unpack(buffer: torch.Tensor, layout: Layout) -> Message:
    """The message of such a tensor; its tensors are leaves, which require a gradient where theirs did."""
    length = 8 * sum(1 + len(shape) for shape, _ in layout.tensors)
    head = buffer[:length].view(torch.int64).tolist() if length else []
    tensors: list[torch.Tensor | None] = []
    for (shape, dtype), place in zip(layout.tensors, layout.places, strict=False):
        kind, strides, head = head[0], head[1 : 1 + len(shape)], head[1 + len(shape) :]
        if kind == _ABSENT:
            tensors.append(None)
            continue
        tensor = _view(buffer, place, shape, strides, dtype).detach()
        tensors.append(tensor.requires_grad_(kind == _REQUIRES_GRAD))
    state = buffer[layout.head_bytes : layout.head_bytes + layout.state_bytes].cpu()
    return Message(tuple(tensors), state if layout.state_bytes else None)


def _view(
    buffer: torch.Tensor, place: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    flat = buffer[place : place + math.prod(shape) * dtype.itemsize].view(dtype)
    return flat.as_strided(tuple(shape), tuple(strides), flat.storage_offset())


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own where its elements fill their memory without overlap, else those of a new one."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != filled:
            return torch.empty(tensor.shape, device="meta").stride()
        filled *= size
    return tensor.stride()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
