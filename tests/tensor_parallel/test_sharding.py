"""Cutting a tensor into what ranks hold, and putting it together."""

from __future__ import annotations

import pytest
import torch

from mlsys_engine.tensor_parallel import Sharding

SEGMENTS = Sharding(dim=1, parts=(((0, 2), (4, 5)), ((2, 4), (5, 6))))
UNEVEN = Sharding(dim=0, parts=(((0, 3),), ((3, 5),)))


@pytest.mark.parametrize("sharding", [SEGMENTS, UNEVEN])
def test_what_ranks_take_assembles_to_the_whole(sharding):
    full = torch.arange(30.0).reshape(5, 6)
    locals = [sharding.take(full, rank) for rank in range(2)]
    assert [tuple(local.shape) for local in locals] == [sharding.local_shape((5, 6), r) for r in range(2)]
    assert torch.equal(sharding.assemble(locals), full)


def test_segments_are_taken_in_the_order_of_the_dim():
    assert SEGMENTS.take(torch.arange(6.0)[None], 1).tolist() == [[2.0, 3.0, 5.0]]
