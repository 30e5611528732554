"""all_reduce, reduce and reduce_scatter against slow references, edges first."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from tests.comm.inputs import FLOATS, INTEGERS, SIZES, assert_reduced, tensor_of

SUM, AVG, PRODUCT, MIN, MAX = (
    dist.ReduceOp.SUM,
    dist.ReduceOp.AVG,
    dist.ReduceOp.PRODUCT,
    dist.ReduceOp.MIN,
    dist.ReduceOp.MAX,
)
BITWISE = (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR)


def _all_sizes_and_dtypes(rank, world_size):
    for dtype in (*FLOATS, *INTEGERS):
        for numel in SIZES:
            inputs = [tensor_of(peer, numel, dtype) for peer in range(world_size)]
            tensor = inputs[rank].clone()
            dist.all_reduce(tensor)
            assert_reduced(tensor, inputs, SUM)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_reduce_of_any_size_and_dtype_matches_the_reference(run_ranks, world_size):
    run_ranks(_all_sizes_and_dtypes, world_size)


def _all_operations(rank, world_size):
    cases = [(op, dtype) for op in (SUM, AVG, PRODUCT, MIN, MAX) for dtype in FLOATS]
    cases += [(op, dtype) for op in (SUM, PRODUCT, MIN, MAX, *BITWISE) for dtype in INTEGERS]
    cases += [(op, torch.bool) for op in (SUM, PRODUCT, MIN, MAX, *BITWISE)]
    for op, dtype in cases:
        for numel in (1, 65, 5003):
            inputs = [tensor_of(peer, numel, dtype) for peer in range(world_size)]
            tensor = inputs[rank].clone()
            dist.all_reduce(tensor, op=op)
            if dtype == torch.bool and op in (MIN, MAX):
                op_of_bool = torch.logical_and if op == MIN else torch.logical_or
                expected = inputs[0]
                for other in inputs[1:]:
                    expected = op_of_bool(expected, other)
                assert torch.equal(tensor, expected)
            else:
                assert_reduced(tensor, inputs, op)


def test_every_operation_matches_the_reference_for_every_dtype_it_takes(run_ranks):
    run_ranks(_all_operations, 3)


def _same_bits(rank, world_size):
    results = []
    for numel in (7, 1000, 70_001, 600_011):
        tensor = tensor_of(rank, numel, torch.float32)
        dist.all_reduce(tensor)
        gathered = [torch.empty_like(tensor) for _ in range(world_size)]
        dist.all_gather(gathered, tensor)
        assert all(torch.equal(gathered[0], other) for other in gathered)
        again = tensor_of(rank, numel, torch.float32)
        dist.all_reduce(again)
        assert torch.equal(again, tensor)
        results.append(tensor.sum().item())
    return results


def test_all_ranks_get_the_same_bits_and_the_same_again(run_ranks):
    results = run_ranks(_same_bits, 3)
    assert results[0] == results[1] == results[2]


def _premultiplied(rank, world_size):
    factor = 0.3
    for dtype in FLOATS:
        inputs = [tensor_of(peer, 777, dtype) for peer in range(world_size)]
        tensor = inputs[rank].clone()
        dist.all_reduce(tensor, op=dist._make_nccl_premul_sum(factor))
        expected = sum(value.double() * factor for value in inputs)
        # Every input is scaled, with one more rounding each, before the sum that the plain tolerance covers.
        size = sum(value.double().abs() for value in inputs)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        limit = 2 * (world_size + 1) * eps * size + torch.finfo(dtype).eps * size
        assert ((tensor.double() - expected).abs() <= limit).all()


def test_a_premultiplied_sum_scales_every_input(run_ranks):
    run_ranks(_premultiplied, 2)


def _non_finite(rank, world_size):
    for dtype in FLOATS:
        tensor = torch.tensor([1.0, math.inf, -math.inf, math.nan, math.inf], dtype=dtype)
        if rank == world_size - 1:
            tensor = torch.tensor([math.inf, 1.0, 1.0, 1.0, -math.inf], dtype=dtype)
        dist.all_reduce(tensor)
        assert tensor[0] == math.inf
        assert tensor[1] == math.inf
        assert tensor[2] == -math.inf
        assert tensor[3:].isnan().all()


def test_infinities_and_nans_propagate(run_ranks):
    run_ranks(_non_finite, 3)


def _views(rank, world_size):
    inputs = [tensor_of(peer, 6 * 7, torch.float32).view(6, 7) for peer in range(world_size)]
    views = {
        "transposed": lambda whole: whole.t(),
        "strided": lambda whole: whole[::2, ::3],
        "one column": lambda whole: whole[:, 3],
        "offset and unaligned": lambda whole: whole.view(-1)[1:30],
        "expanded to no dimension": lambda whole: whole[2, 2],
    }
    for name, view in views.items():
        whole = inputs[rank].clone()
        dist.all_reduce(view(whole))
        assert_reduced(view(whole).contiguous(), [view(other).contiguous() for other in inputs], SUM)
        untouched = torch.ones_like(whole, dtype=torch.bool)
        view(untouched).zero_()
        assert torch.equal(whole[untouched], inputs[rank][untouched]), name


def test_views_are_reduced_in_place_and_their_surroundings_left_alone(run_ranks):
    run_ranks(_views, 2)


def _complex(rank, world_size):
    inputs = [
        torch.complex(tensor_of(peer, 9, torch.float64), tensor_of(peer, 9, torch.float64, 1))
        for peer in range(2)
    ]
    tensor = inputs[rank].clone()
    dist.all_reduce(tensor)
    assert torch.equal(tensor, inputs[0] + inputs[1])


def test_complex_sums_work_through_torch(run_ranks):
    run_ranks(_complex, 2)


def _sparse(rank, world_size):
    # The last rank has no entry at all; others overlap in row 1.
    indices = (
        torch.tensor([[1, rank + 2]]) if rank < world_size - 1 else torch.empty((1, 0), dtype=torch.int64)
    )
    values = torch.full((indices.shape[1], 3), float(rank + 1))
    tensor = torch.sparse_coo_tensor(indices, values, (8, 3))
    dist.all_reduce(tensor)
    expected = torch.zeros(8, 3)
    for peer in range(world_size - 1):
        expected[1] += peer + 1
        expected[peer + 2] += peer + 1
    assert torch.equal(tensor.to_dense(), expected)


def test_sparse_tensors_are_summed_also_when_a_rank_has_no_entries(run_ranks):
    run_ranks(_sparse, 3)


def _reduce(rank, world_size):
    for root in range(world_size):
        for numel in (0, 1, 5, 70_001):
            inputs = [tensor_of(peer, numel, torch.float32, root) for peer in range(world_size)]
            tensor = inputs[rank].clone()
            dist.reduce(tensor, dst=root)
            if rank == root:
                assert_reduced(tensor, inputs, SUM)


def test_reduce_puts_the_sum_on_any_root(run_ranks):
    run_ranks(_reduce, 3)


def _reduce_scatter(rank, world_size):
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for numel in (0, 1, 3, 1000, 70_001):
            inputs = [tensor_of(peer, numel * world_size, dtype) for peer in range(world_size)]
            mine = [value.chunk(world_size)[rank] if numel else value for value in inputs]
            output = torch.empty(numel, dtype=dtype)
            dist.reduce_scatter_tensor(output, inputs[rank].clone())
            assert_reduced(output, mine, SUM)
            parts = [part.clone() for part in inputs[rank].view(world_size, numel)]
            dist.reduce_scatter(output, parts)
            assert_reduced(output, mine, SUM)
    whole = tensor_of(rank, 64 * world_size, torch.float32)
    inputs = [
        tensor_of(peer, 64 * world_size, torch.float32).chunk(world_size)[rank] for peer in range(world_size)
    ]
    part = whole.chunk(world_size)[rank]
    dist.reduce_scatter_tensor(part, whole, op=AVG)  # FSDP's way: the output is a part of the input
    assert_reduced(part, inputs, AVG)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_reduce_scatter_gives_each_rank_its_part_also_in_place(run_ranks, world_size):
    run_ranks(_reduce_scatter, world_size)
