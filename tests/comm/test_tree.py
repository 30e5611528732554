"""Reductions in the order of the canonical tree: the same bits on every layout, and at every world size."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mlsys_engine import comm
from mlsys_engine.numerics import TreeSum
from tests.comm.inputs import tensor_of

LAYOUTS = {4: ("0,0,0,0", "0,0,1,1", "0,1,0,1", "0,0,0,1", "0,1,2,3"), 3: ("0,0,1", "0,1,0"), 2: ("0,1",)}
CASES = [(size, layout) for size, layouts in LAYOUTS.items() for layout in layouts]
NUMEL = 5_003


def _leaf(index, dtype=torch.float32):
    if dtype.is_complex:
        return torch.complex(_leaf(index), _leaf(index + 17))
    return tensor_of(index, NUMEL, dtype) * 10.0 ** (index % 4)


def _tree(leaves):
    if len(leaves) == 1:
        return leaves[0]
    half = 1 << (len(leaves) - 1).bit_length() - 1
    return _tree(leaves[:half]) + _tree(leaves[half:])


def _reductions(rank, world_size):
    for dtype in (torch.float32, torch.float64, torch.complex64):
        expected = _tree([_leaf(peer, dtype) for peer in range(world_size)])
        tensor = _leaf(rank, dtype)
        comm.all_reduce_tree(tensor)
        assert torch.equal(tensor, expected)
        tensor = _leaf(rank, dtype)
        comm.all_reduce_tree(tensor, op=dist.ReduceOp.AVG, async_op=True).wait()
        if dtype.is_complex:  # part by part; torch's complex division rounds otherwise
            tensor, expected = torch.view_as_real(tensor), torch.view_as_real(expected)
        assert torch.equal(tensor, expected / world_size)
        expected = torch.view_as_complex(expected) if dtype.is_complex else expected
        whole, part = _leaf(rank, dtype).repeat(world_size), torch.empty(NUMEL, dtype=dtype)
        comm.reduce_scatter_tree(part, whole)
        assert torch.equal(part, expected)
    tensor = torch.full((7,), rank, dtype=torch.int64)
    comm.all_reduce_tree(tensor, op=dist.ReduceOp.MAX)
    assert (tensor == world_size - 1).all()


@pytest.mark.parametrize(("world_size", "layout"), CASES)
def test_reductions_have_the_bits_of_the_tree_on_any_layout_of_hosts(run_ranks, world_size, layout):
    run_ranks(_reductions, world_size, env={"MLSYS_LOCALITY": layout})


def _leaves(rank, world_size):
    each = 8 // world_size
    tree = TreeSum()
    for index in range(rank * each, (rank + 1) * each - 1):
        tree.add(_leaf(index))
    total = _leaf((rank + 1) * each - 1)
    tree.finish(total)
    comm.all_reduce_tree(total)
    assert torch.equal(total, _tree([_leaf(index) for index in range(8)]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_eight_leaves_have_one_sum_at_every_world_size(run_ranks, world_size):
    run_ranks(_leaves, world_size, env={"MLSYS_LOCALITY": "0,1,1,0"[: 2 * world_size - 1]})
