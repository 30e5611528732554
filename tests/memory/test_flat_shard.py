from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.memory.flat_shard import FlatShard, flat_boxes


@given(shape=st.lists(st.integers(1, 5), max_size=4), data=st.data())
def test_boxes_cover_the_range_in_order_and_nothing_else(shape, data):
    numel = math.prod(shape)
    first = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(first, numel))
    whole = torch.arange(numel).view(shape)
    found = []
    for box in flat_boxes(shape, first, end):
        part = whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
        assert tuple(part.shape) == box.sizes and part.numel() == box.numel > 0
        found += part.reshape(-1).tolist()
    assert found == list(range(first, end))


def test_a_matrix_needs_three_boxes_at_most():
    boxes = flat_boxes((5, 4), 3, 18)
    assert [(box.offsets, box.sizes) for box in boxes] == [
        ((0, 3), (1, 1)),
        ((1, 0), (3, 4)),
        ((4, 0), (1, 2)),
    ]


def test_pieces_are_views_and_the_range_is_taken_from_a_whole_tensor():
    whole = torch.arange(20.0).view(5, 4)
    shard = FlatShard(shape=whole.shape, first=3, data=torch.zeros(15))
    shard.data.copy_(shard.take(whole))
    rebuilt = torch.full((5, 4), -1.0)
    for box, piece in shard.pieces():
        rebuilt[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))] = piece
        piece.zero_()
    assert torch.equal(rebuilt.view(-1)[3:18], whole.view(-1)[3:18])
    assert rebuilt.view(-1)[:3].eq(-1).all() and rebuilt.view(-1)[18:].eq(-1).all()
    assert not shard.data.any()
    assert (shard.first, shard.end, shard.size()) == (3, 18, whole.shape)
