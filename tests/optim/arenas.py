"""Parameters in flat arenas, as a data-parallel runner lays them out, for tests."""

from __future__ import annotations

import torch

from mlsys_engine.memory.flat_arena import FlatArena, layout_slots

Shapes = tuple[tuple[int, ...], ...]


def build(shapes: Shapes, seed: int = 0) -> tuple[list[tuple[str, torch.nn.Parameter]], FlatArena, FlatArena]:
    """Named parameters that are views of the first arena and whose gradients are views of the second."""
    generator = torch.Generator().manual_seed(seed)
    slots = layout_slots([(f"p{number}", shape) for number, shape in enumerate(shapes)], torch.float32)
    params, grads = FlatArena.build(slots, torch.float32), FlatArena.build(slots, torch.float32)
    named = []
    for slot in slots:
        params.view(slot).copy_(torch.randn(slot.shape, generator=generator))
        parameter = torch.nn.Parameter(params.view(slot))
        parameter.grad = grads.view(slot)
        named.append((slot.name, parameter))
    return named, params, grads


def fill_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    """Random gradients, written in place, so that arena views stay arena views."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.grad is None:
            parameter.grad = values
        else:
            parameter.grad.copy_(values)
