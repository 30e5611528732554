"""The CUDA kernels give the CPU's bits, with scalars on the device. Needs a GPU and a CUDA build."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlsys_engine.optim import norms
from mlsys_engine.optim.kernels import is_native
from tests.optim import arenas
from tests.optim.variants import elementwise_variants, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = ((3, 5), (0,), (17,), (1,), (5000,), (70_001,))


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    if not is_native(torch.device("cuda")):
        pytest.skip("the extension was built without CUDA kernels")


@pytest.mark.parametrize(("name", "variant"), elementwise_variants())
def test_cuda_steps_give_the_bits_of_the_cpu(name: str, variant: dict[str, Any]) -> None:
    named, _, _ = arenas.build(SHAPES)
    host = [torch.nn.Parameter(parameter.detach().clone()) for _, parameter in named]
    device = [torch.nn.Parameter(parameter.detach().cuda()) for parameter in host]
    on_cpu, on_cuda = make(name, host, variant), make(name, device, variant)
    for step in range(5):
        arenas.fill_gradients(host, seed=step)
        for a, b in zip(host, device, strict=True):
            assert a.grad is not None
            b.grad = a.grad.cuda()
        on_cpu.step_scaled(grad_scale=0.5)
        on_cuda.step_scaled(
            grad_scale=torch.tensor(0.5, device="cuda"), skip=torch.tensor(False, device="cuda")
        )
        on_cuda.step_scaled(skip=torch.tensor(True, device="cuda"))
    for a, b in zip(host, device, strict=True):
        assert torch.equal(a, b.cpu())


def test_cuda_norm_is_deterministic_and_close_to_the_cpus() -> None:
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    optimizer = make("adamw", params, {"lr": 0.1})
    arenas.fill_gradients(params, seed=0)
    first, second = optimizer.sum_of_squares().item(), optimizer.sum_of_squares().item()
    assert first == second
    exact = sum(p.grad.double().square().sum().item() for p in params if p.grad is not None)
    num = sum(parameter.numel() for parameter in params)
    assert abs(first - exact) <= 2 * num * 2.0**-53 * exact  # positive terms, num roundings a side


def test_cuda_terms_by_chunk_add_up_to_the_norm_to_the_bit() -> None:
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    spans = torch.tensor([[parameter.data_ptr(), parameter.numel()] for parameter in params])
    num_terms = sum(-(-parameter.numel() // 4096) for parameter in params)
    terms = torch.empty(num_terms, dtype=torch.float64, device="cuda")
    norms.squares_of_chunks(spans, terms)
    assert norms.sum_of_terms(terms).item() == norms.sum_of_squares([p.detach() for p in params]).item()
