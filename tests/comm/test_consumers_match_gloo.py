"""Everything torch builds on a process group, on gloo and on our backend: the same bits.

Two ranks run on ordinary floats, four on numbers that add up exactly (see consumers/numbers.py); a consumer
whose numbers cannot be exact (16-bit floats, PowerSGD, batch normalisation) is compared at two ranks only.
"""

from __future__ import annotations

import functools
import inspect
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.consumers import data_parallel, model_parallel, services
from tests.comm.consumers.numbers import Numbers
from tests.support.no_gloo import forbid_gloo
from tests.support.ranks import run_ranks

CONSUMERS: dict[str, Callable[[int, int, Numbers], dict[str, Any]]] = {
    name: function
    for module in (data_parallel, model_parallel, services)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
}
ROUNDED = {
    "ddp_fp16_hook",
    "ddp_bf16_hook",
    "ddp_power_sgd",
    "ddp_buffers",
    "fsdp2_bf16_reduced_in_fp32",
    "fsdp2_bf16_reduced_in_bf16",
    "fsdp2_fp16",
}
MESHES = {"hsdp", "tensor_parallel_with_fsdp2"}  # two by two
TRACED = {"functional_compiled"}  # seconds of tracing a rank, which say nothing about their number


def _names(world_size: int) -> list[str]:
    left_out = MESHES if world_size == 2 else ROUNDED | TRACED
    return [name for name in CONSUMERS if name not in left_out]


def _portable(value: Any) -> Any:
    """Values whose equality is equality of bits, and which are pickled by value."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous()
        return str(data.dtype), tuple(data.shape), data.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, float):
        return struct.pack("d", value)
    if isinstance(value, dict):
        return {key: _portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(entry) for entry in value]
    return value


def _run_all(rank: int, world_size: int, backend: str, folder: str) -> dict[str, Any]:
    if backend != "gloo":
        forbid_gloo()
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    numbers = Numbers(exact=world_size > 2)
    results = {}
    for name in _names(world_size):
        torch.manual_seed(5)
        results[name] = _portable(CONSUMERS[name](rank, world_size, numbers))
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[dict[str, Any]]]:
    """Every consumer's results on all ranks, of one backend and world size."""

    @functools.cache
    def of(backend: str, world_size: int) -> list[dict[str, Any]]:
        folder = str(tmp_path_factory.mktemp(f"{backend}-{world_size}"))
        return run_ranks(_run_all, world_size, backend, folder, init=False)

    return of


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, 2) for name in _names(2)] + [pytest.param(name, 4, marks=pytest.mark.slow) for name in _names(4)],
)
def test_the_bits_are_those_of_gloo(results, name, world_size):
    expected, got = results("gloo", world_size), results("mlsys", world_size)
    for rank in range(world_size):
        wanted, given = expected[rank][name], got[rank][name]
        assert wanted.keys() == given.keys()
        differ = [key for key in wanted if wanted[key] != given[key]]
        assert not differ, f"rank {rank}: {differ}"
