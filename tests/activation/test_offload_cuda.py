"""Activations of a GPU in pinned host memory: the same bits, memory used again in order, no waiting host."""

from __future__ import annotations

import gc

import pytest
import torch

from mlsys_engine.activation.offload import Offloader, OffloadOptions, measure_bandwidth
from mlsys_engine.activation.offload.pinned import PinnedStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

MIB = 1 << 20
NUMEL = 4 * MIB  # 16 MiB a tensor: copies that take long enough to be overtaken
LONG = 200_000_000  # cycles: about a tenth of a second


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def store_of(offloader: Offloader, device: torch.device) -> PinnedStore:
    store = offloader._lane(device).store
    assert isinstance(store, PinnedStore)
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("numel", [0, 1, 1000])
def test_what_is_read_has_the_bits_of_what_was_put(device, dtype, numel):
    offloader = Offloader(OffloadOptions(max_writing_bytes=0))
    source = torch.randint(0, 2, (numel * dtype.itemsize,), dtype=torch.uint8, device=device).view(dtype)
    expected = source.clone()
    kept = offloader.put("block", source)
    del source
    for _ in range(3):
        found = kept.read()
        assert found.device == device
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("max_writing_bytes", [0, 40 * MIB, 1 << 40])
def test_memory_is_used_again_only_after_it_was_copied(device, max_writing_bytes):
    offloader = Offloader(OffloadOptions(max_writing_bytes=max_writing_bytes, slab_bytes=64 * MIB))
    for step in range(3):
        torch.cuda._sleep(LONG)  # the host runs ahead of everything that follows
        kept = []
        for number in range(12):
            source = torch.full((NUMEL,), float(100 * step + number), device=device)
            kept.append(offloader.put(number, source))
            del source
            torch.full((NUMEL,), -1.0, device=device)  # takes the memory that was given back, if any
        for number in reversed(range(12)):
            found = kept.pop().read()
            noise = torch.full((NUMEL,), -2.0, device=device)
            assert torch.equal(found, torch.full_like(found, 100 * step + number))
            del found, noise


def test_memory_and_slots_of_what_was_never_read_are_used_again_in_order(device):
    offloader = Offloader(OffloadOptions(max_writing_bytes=0, slab_bytes=64 * MIB))
    kept = [offloader.put(number, torch.full((NUMEL,), float(number), device=device)) for number in range(3)]
    torch.cuda._sleep(LONG)
    assert kept[2].read().numel() == NUMEL  # loads 1 ahead
    kept.clear()
    others = [offloader.put(0, torch.full((NUMEL,), 10.0 + number, device=device)) for number in range(4)]
    found = [one.read() for one in others]
    for number, one in enumerate(found):
        assert torch.equal(one, torch.full_like(one, 10.0 + number))


def test_nothing_but_the_caller_makes_the_host_wait(device):
    offloader = Offloader(OffloadOptions(max_writing_bytes=0))
    offloader.put(0, torch.zeros(4 * NUMEL, device=device)).read()  # pinned memory is there
    sources = [torch.full((NUMEL,), float(number), device=device) for number in range(4)]
    found = [torch.empty_like(source) for source in sources]
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * LONG)
    kept = [offloader.put(number, source) for number, source in enumerate(sources)]
    for number in reversed(range(4)):
        found[number].copy_(kept[number].read())
    running = torch.cuda.current_stream().query()
    assert not running  # the device still sleeps
    torch.cuda.synchronize()
    assert all(torch.equal(one, source) for one, source in zip(found, sources, strict=True))


def test_tensors_are_read_on_another_stream(device):
    offloader = Offloader(OffloadOptions(max_writing_bytes=0))
    kept = [offloader.put(number, torch.full((NUMEL,), float(number), device=device)) for number in range(3)]
    kept[2].read()
    other = torch.cuda.Stream(device)
    with torch.cuda.stream(other):
        found = kept[1].read()  # was loaded ahead for the stream before
        right = (found == 1.0).all()
    del found
    torch.full((NUMEL,), -1.0, device=device)
    other.synchronize()
    assert right.item()


def test_pinned_memory_does_not_grow_and_device_memory_is_given_back(device):
    offloader = Offloader(OffloadOptions(max_writing_bytes=0, slab_bytes=64 * MIB))

    def step() -> None:
        kept = [offloader.put(n, torch.full((NUMEL,), float(n), device=device)) for n in range(8)]
        while kept:
            kept.pop().read()

    step()
    torch.cuda.synchronize()
    store, before = store_of(offloader, device), torch.cuda.memory_allocated()
    size = store.num_host_bytes
    assert size == 128 * MIB
    for _ in range(100):
        step()
    torch.cuda.synchronize()
    assert store.num_host_bytes == size
    assert torch.cuda.memory_allocated() == before


def test_the_peak_is_what_is_on_the_way_and_two_blocks(device):
    offloader = Offloader(OffloadOptions(max_writing_bytes=0))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = [offloader.put(n, torch.full((NUMEL,), float(n), device=device)) for n in range(12)]
    while kept:
        kept.pop().read()
    # One that is read, one that is loaded ahead, and one that the caller has not let go of yet.
    assert torch.cuda.max_memory_allocated() - before <= 3 * 4 * NUMEL


def test_a_tensor_larger_than_a_slab_gets_one_of_its_own(device):
    offloader = Offloader(OffloadOptions(slab_bytes=1000))
    kept = [offloader.put(0, torch.full((numel,), 3.0, device=device)) for numel in (1, 1024, 1025)]
    assert [one.read().sum().item() for one in kept] == [3.0, 3072.0, 3075.0]
    assert store_of(offloader, device).num_host_bytes == (1 + 1 + 2) * 4096


def test_the_bandwidth_is_measured(device):
    found = measure_bandwidth(device)
    assert found.write_bytes_per_s > 0
    assert found.read_bytes_per_s > 0
