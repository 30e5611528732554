"""Inputs that every rank can recompute for every other, and the references of the reductions."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
# Zero, fewer elements than ranks, odd, around a vector register, above the inline and the staging limits.
SIZES = (0, 1, 2, 3, 17, 63, 65, 1000, 4099, 70_001, 600_011)


def tensor_of(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> torch.Tensor:
    """The tensor that `rank` contributes: small values, so that integer sums and products stay exact."""
    generator = torch.Generator().manual_seed(1_000_003 * rank + 31 * numel + salt)
    if dtype == torch.bool:
        return torch.randint(0, 2, (numel,), generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0 if dtype == torch.uint8 else -3, 4, (numel,), generator=generator).to(dtype)


def reduced(inputs: list[torch.Tensor], op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """The slow, obvious reduction: floats in float64, integers in their own wrapping arithmetic."""
    dtype = inputs[0].dtype
    wide = [tensor.double() if dtype.is_floating_point else tensor for tensor in inputs]
    if dtype == torch.bool:
        combine = {dist.ReduceOp.SUM: torch.logical_or, dist.ReduceOp.PRODUCT: torch.logical_and}.get(op)
    else:
        combine = {
            dist.ReduceOp.SUM: torch.add,
            dist.ReduceOp.AVG: torch.add,
            dist.ReduceOp.PRODUCT: torch.mul,
        }.get(op)
    combine = (
        combine
        or {
            dist.ReduceOp.MIN: torch.minimum,
            dist.ReduceOp.MAX: torch.maximum,
            dist.ReduceOp.BAND: torch.bitwise_and,
            dist.ReduceOp.BOR: torch.bitwise_or,
            dist.ReduceOp.BXOR: torch.bitwise_xor,
        }[op]
    )
    result = functools.reduce(combine, wide)
    return result / len(inputs) if op == dist.ReduceOp.AVG else result


def tolerance(inputs: list[torch.Tensor], op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """How far a correct result may be from `reduced`, element by element.

    Adding p numbers in any order loses at most (p - 1) eps times the sum of magnitudes (Higham 2002, 4.2);
    a product (p - 1) eps times its magnitude. fp16 and bf16 accumulate in fp32, whose eps applies then,
    and then round once: half an ulp, eps/2 of the result. MIN and MAX are exact.
    """
    dtype, num_ranks = inputs[0].dtype, len(inputs)
    if not dtype.is_floating_point or op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX):
        return torch.zeros(inputs[0].shape, dtype=torch.float64)
    accumulated_in = torch.float64 if dtype == torch.float64 else torch.float32
    magnitudes = [tensor.double().abs() for tensor in inputs]
    product = op == dist.ReduceOp.PRODUCT
    size = functools.reduce(torch.mul if product else torch.add, magnitudes)
    # One more rounding for the division of AVG, and one for float64 sums whose reference rounds too.
    lost = (num_ranks + 1) * torch.finfo(accumulated_in).eps * size
    if dtype in (torch.float16, torch.bfloat16):
        lost = lost + torch.finfo(dtype).eps / 2 * size + torch.finfo(dtype).smallest_normal
    return lost


def assert_reduced(got: torch.Tensor, inputs: list[torch.Tensor], op: dist.ReduceOp.RedOpType) -> None:
    """Checks a reduction against the reference within its derived tolerance."""
    expected = reduced(inputs, op)
    if not got.dtype.is_floating_point:
        assert torch.equal(got, expected), (op, got.dtype, got.numel())
        return
    distance = (got.double() - expected).abs()
    worst = (distance - tolerance(inputs, op)).max().item() if got.numel() else 0.0
    assert worst <= 0, f"{op} of {got.numel()} {got.dtype}: beyond the tolerance by {worst}"
