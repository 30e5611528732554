"""MLSYS_SIMD lowers the instruction set of a process, and refuses what it cannot give."""

from __future__ import annotations

import hashlib

import pytest
import torch

from mlsys_engine.optim.kernels import operators
from tests.support.ranks import run_ranks

LEVELS = ["scalar", "avx2", "avx512"]


def show_level(rank: int, world_size: int) -> str:
    try:
        return str(operators().simd_level())
    except ValueError as error:
        return str(error)


def hash_of_conversions(rank: int, world_size: int) -> str:
    generator = torch.Generator().manual_seed(0)
    floats = (
        torch.randint(-(2**31), 2**31, (10_007,), generator=generator).to(torch.int32).view(torch.float32)
    )
    halves = [operators().cast(floats, dtype) for dtype in (torch.float16, torch.bfloat16)]
    back = [operators().cast(half, torch.float32) for half in halves]
    return hashlib.sha256(b"".join(t.view(torch.uint8).numpy().tobytes() for t in halves + back)).hexdigest()


def test_scalar_is_always_available() -> None:
    assert run_ranks(show_level, 1, init=False, env={"MLSYS_SIMD": "scalar"}) == ["scalar"]


def test_every_level_converts_to_the_same_bits() -> None:
    (best,) = run_ranks(show_level, 1, init=False)
    hashes = {
        run_ranks(hash_of_conversions, 1, init=False, env={"MLSYS_SIMD": level})[0]
        for level in LEVELS[: LEVELS.index(best) + 1]
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["sse9", "AVX2 "])
def test_an_unknown_level_is_refused_with_the_known_ones(name: str) -> None:
    (message,) = run_ranks(show_level, 1, init=False, env={"MLSYS_SIMD": name})
    assert message == f"MLSYS_SIMD={name} names no instruction set. Expected scalar, avx2 or avx512."
