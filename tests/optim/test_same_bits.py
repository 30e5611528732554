"""Threads and instruction sets never change a bit of a step or of a norm."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

from mlsys_engine.optim import OPTIMIZERS
from mlsys_engine.optim.kernels import operators
from tests.optim import arenas
from tests.optim.variants import VARIANTS, WITH_FORMS, gradients_for, make
from tests.support.ranks import run_ranks

# Odd lengths, so that every vector width has a remainder; long enough for two threads to share one tensor.
SHAPES = ((100_003,), (31,), (7, 9), (65_537,))
NARROW = ({"moments": "int8"}, {"moments": "bf16", "master": None}, {"master": "fp32", "ema": 0.9})


def run_everything(rank: int, world_size: int, threads: int) -> dict[str, object]:
    """All rules on loose parameters and in arenas, with `threads` threads: every resulting number."""
    torch.set_num_threads(threads)
    results: dict[str, object] = {"simd": operators().simd_level()}
    for name in sorted(set(OPTIMIZERS) - {"muon"}):  # its products are torch's
        for number, variant in enumerate(VARIANTS[name][1:4:2]):
            named, params, grads = arenas.build(SHAPES, seed=number)
            loose = [torch.nn.Parameter(parameter.detach().clone()) for _, parameter in named]
            for where, members in (("arena", [parameter for _, parameter in named]), ("loose", loose)):
                optimizer = make(name, members, variant)
                if where == "arena":
                    optimizer.adopt(params, grads)
                for step in range(3):
                    arenas.fill_gradients(members, seed=step)
                    norm = optimizer.sum_of_squares()
                    optimizer.step_scaled(grad_scale=1 / norm.sqrt())
                results[f"{name} {number} {where}"] = (
                    norm.item(),
                    [member.detach().clone().numpy().tobytes() for member in members],
                )
        for narrow in NARROW if name in WITH_FORMS else ():
            results[f"{name} {narrow}"] = run_narrow(name, narrow)
    return results


def run_narrow(name: str, options: dict[str, Any]) -> list[bytes]:
    """Parameters and state of every stored form after three steps."""
    dtype = torch.float16 if options.get("master") == "fp32" else torch.bfloat16
    values = torch.randn(20_011, generator=torch.Generator().manual_seed(1))
    parameter = torch.nn.Parameter(values.to(dtype))
    optimizer = make(name, [parameter], {**VARIANTS[name][-1], **options})
    norms = []
    for gradient in gradients_for((20_011,), 3, seed=2):
        parameter.grad = gradient.to(dtype)
        norms.append(optimizer.sum_of_squares())
        optimizer.step_scaled(grad_scale=1 / norms[-1].sqrt())
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    members = [tensor.detach().clone().view(-1).view(torch.uint8) for tensor in (parameter, *norms, *state)]
    return [member.numpy().tobytes() for member in members]


def numbers(threads: int, simd: str = "") -> dict[str, object]:
    (result,) = run_ranks(run_everything, 1, threads, init=False, env={"MLSYS_SIMD": simd})
    return result


def test_arena_and_loose_one_and_two_threads_give_the_same_bits() -> None:
    one, two = numbers(1), numbers(2)
    assert one == two
    for key in one:
        if key.endswith("arena"):
            assert one[key] == one[key.replace("arena", "loose")]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets are chosen on x86-64 only")
@pytest.mark.parametrize("level", ["scalar", "avx2"])
def test_every_instruction_set_gives_the_bits_of_the_best_one(level: str) -> None:
    best = numbers(1)
    order = ["scalar", "avx2", "avx512"]
    if order.index(str(best["simd"])) < order.index(level):
        pytest.skip(f"this CPU lacks {level}")
    lower = numbers(1, level)
    assert lower.pop("simd") == level
    best.pop("simd")
    assert lower == best
