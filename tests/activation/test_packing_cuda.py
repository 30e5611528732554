"""The CUDA packing kernels give the CPU's bits. Needs a GPU and a CUDA build."""

from __future__ import annotations

import pytest
import torch

from mlsys_engine.activation.packing import pack
from mlsys_engine.optim.kernels import is_native
from tests.activation.packing_cases import TAKEN, hard_tensors, same_values, spread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    if not is_native(torch.device("cuda")):
        pytest.skip("the extension was built without CUDA kernels")


@pytest.mark.parametrize(("form", "dtype"), TAKEN)
def test_cuda_packs_and_unpacks_to_the_bits_of_the_cpu(form: str, dtype: torch.dtype) -> None:
    for tensor in (*hard_tensors(dtype), spread(3_000_001, dtype)):
        on_cpu, on_cuda = pack(tensor, form, seed=3), pack(tensor.cuda(), form, seed=3)
        if form == "bf16":  # the payload of a nan is anybody's
            assert same_values(on_cuda.data.cpu().view(torch.bfloat16), on_cpu.data.view(torch.bfloat16))
        else:
            assert torch.equal(on_cuda.data.cpu(), on_cpu.data)
        assert same_values(on_cuda.unpack().cpu(), on_cpu.unpack())


@pytest.mark.parametrize(("form", "dtype"), TAKEN)
def test_unaligned_views_on_the_device_are_packed_like_their_copies(form: str, dtype: torch.dtype) -> None:
    base = spread(1001, dtype).cuda()
    for first in range(1, 9):
        view = base[first:]
        packed = pack(view, form, seed=first)
        assert torch.equal(packed.data, pack(view.clone(), form, seed=first).data)
        assert torch.equal(packed.unpack(), pack(view.clone(), form, seed=first).unpack())
