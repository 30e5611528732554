"""Slots are aligned, keep their order, and their views share the arena's memory."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.memory import ALIGNMENT_BYTES, FlatArena, layout_slots

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=8)


@given(SHAPES, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_slots_never_overlap_and_start_aligned(shapes: list[list[int]], dtype: torch.dtype) -> None:
    slots = layout_slots([(str(i), shape) for i, shape in enumerate(shapes)], dtype)
    assert [slot.name for slot in slots] == [str(i) for i in range(len(shapes))]
    for slot in slots:
        assert slot.offset * dtype.itemsize % ALIGNMENT_BYTES == 0
    for before, after in itertools.pairwise(slots):
        assert before.end <= after.offset


def test_views_share_memory_and_scalars_have_one_element() -> None:
    slots = layout_slots([("w", (2, 3)), ("scale", ())], torch.float32)
    arena = FlatArena.build(slots, torch.float32)
    arena.view(slots[1]).fill_(5.0)
    arena.view(slots[0]).fill_(1.0)
    assert arena.data.sum() == 11
    assert arena.data[slots[1].offset] == 5


def test_empty_model_has_an_empty_arena() -> None:
    assert FlatArena.build(layout_slots([], torch.float32), torch.float32).data.numel() == 0
