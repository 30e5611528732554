"""Offloaded activations: the same bits, loaded in the backward's order, nothing left behind or in the way."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import resource
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsys_engine.activation.offload import Offloader, OffloadError, OffloadOptions, measure_bandwidth
from mlsys_engine.activation.offload.base import DIRECTORY_VARIABLE
from mlsys_engine.errors import ConfigError, InternalError
from tests.activation.slow_store import NUMEL, values

CPU = torch.device("cpu")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.fixture
def offloader(tmp_path: Path) -> Offloader:
    return Offloader(OffloadOptions(directory=tmp_path, max_writing_bytes=0))


def store_of(offloader: Offloader) -> Any:
    return offloader._lane(CPU).store


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, NUMEL])
def test_what_is_read_has_the_bits_of_what_was_put(offloader, dtype, numel):
    source = torch.randint(0, 2, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    expected = source.clone()
    kept = offloader.put("block", source)
    del source
    for _ in range(3):  # several backwards
        found = kept.read()
        assert found.dtype == dtype
        assert found.shape == (numel,)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_tensor_that_needs_a_gradient_comes_back_without_one(offloader):
    kept = offloader.put("block", values(1).requires_grad_() * 2)
    assert torch.equal(kept.read(), values(2))
    assert not kept.read().requires_grad


def test_only_flat_tensors_are_taken(offloader):
    for tensor in (torch.ones(2, 2), torch.ones(4)[::2]):
        with pytest.raises(InternalError, match="flat"):
            offloader.put("block", tensor)


def test_many_tensors_read_while_others_are_written_are_not_mixed_up(tmp_path):
    offloader = Offloader(OffloadOptions(directory=tmp_path, max_writing_bytes=3 * 4 * NUMEL))
    for step in range(20):
        kept = [(n, offloader.put(n // 3, values(step * 100 + n, NUMEL + n * 37))) for n in range(30)]
        for number, one in reversed(kept):
            assert torch.equal(one.read(), values(step * 100 + number, NUMEL + number * 37))


def test_calls_of_one_block_are_told_apart_by_begin_block(offloader):
    kept = []
    for number in range(4):
        offloader.begin_block()
        kept.append(offloader.put("the block", values(number)))
    kept[3].read()
    loaded = [one.num_bytes_on_device > 0 for one in kept]
    assert loaded == [False, False, True, False]  # one call ahead; what was read is the caller's


def test_the_backward_of_what_follows_loads_the_last_block(offloader):
    kept = [offloader.put(number, values(number)) for number in range(3)]
    assert [one.num_bytes_on_device for one in kept] == [0, 0, 0]
    offloader.begin_backward()
    assert [one.num_bytes_on_device for one in kept] == [0, 0, 4 * NUMEL]
    assert torch.equal(kept[2].read(), values(2))


@pytest.mark.parametrize("max_writing_bytes", [0, 1 << 20])
def test_the_file_holds_no_source_that_is_written(tmp_path, max_writing_bytes):
    offloader = Offloader(OffloadOptions(directory=tmp_path, max_writing_bytes=max_writing_bytes))
    source = values(1)
    storage = weakref.ref(source.untyped_storage())
    kept = offloader.put("block", source)
    del source
    if max_writing_bytes:
        kept._write.wait()  # and nobody asks the lane for anything
    assert storage() is None
    assert kept.num_bytes_on_device == 0


def test_system_calls_that_do_a_part_are_called_again(offloader, monkeypatch):
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, start: write(file, data[:1001], start))
    monkeypatch.setattr(os, "preadv", lambda file, data, start: read(file, [data[0][:1001]], start))
    source = torch.arange(float(NUMEL))
    assert torch.equal(offloader.put("block", source).read(), source)


def test_what_was_read_belongs_to_the_reader_alone(offloader):
    kept = offloader.put("block", values(1))
    found = kept.read()
    found += 1
    assert torch.equal(kept.read(), values(1))
    storage = weakref.ref(found.untyped_storage())
    del found
    assert storage() is None


def test_what_was_loaded_ahead_and_never_read_is_let_go(offloader):
    kept = [offloader.put(number, values(number)) for number in range(2)]
    kept[1].read()
    load = kept[0]._load
    assert load is not None
    load.wait()
    assert load.tensor is not None
    storage = weakref.ref(load.tensor.untyped_storage())
    del load
    kept.clear()
    assert storage() is None


def test_a_thousand_steps_stay_in_the_file_of_the_first(offloader):
    def step(number: int) -> None:
        kept = [offloader.put(n, values(number + n, NUMEL * (1 + n % 3))) for n in range(4)]
        while kept:
            found = kept.pop().read()
            assert found[-1] == number + len(kept)

    step(0)
    size = store_of(offloader).num_file_bytes
    for number in range(1, 1000):
        step(number)
    assert store_of(offloader).num_file_bytes == size
    assert store_of(offloader)._extents.end == 0


def test_a_full_disk_is_named_where_tensors_are_put_and_read_and_the_next_step_works(tmp_path):
    offloader = Offloader(OffloadOptions(directory=tmp_path, max_writing_bytes=8 * NUMEL))
    first = offloader.put("block", values(1))
    with files_of_at_most(8192):
        kept = [offloader.put("block", values(2)), offloader.put("block", values(3))]
        with pytest.raises(OffloadError, match=f"written to {tmp_path}/mlsys-offload-") as caught:
            for number in range(4, 8):
                kept.append(offloader.put("block", values(number)))
        assert os.strerror(errno.EFBIG) in caught.value.given
        assert DIRECTORY_VARIABLE in caught.value.action
        storage = [one.num_bytes_on_device for one in kept]
        assert storage == [0] * len(kept)  # a failure holds no memory
        with pytest.raises(OffloadError, match="could not be written"):
            kept[1].read()
    assert torch.equal(first.read(), values(1))
    again = [offloader.put("block", values(number)) for number in range(9)]  # while the old step's still live
    assert all(torch.equal(one.read(), values(number)) for number, one in enumerate(again))


def test_a_file_that_was_cut_off_is_named_when_it_is_read(offloader):
    kept = [offloader.put("block", values(number)) for number in range(2)]
    os.ftruncate(store_of(offloader)._file.descriptor, 4096)
    with pytest.raises(OffloadError, match=r"read from .*mlsys-offload-.*: it ends after 4096 bytes"):
        kept[1].read()
    assert torch.equal(kept[0].read(), values(0))
    assert torch.equal(offloader.put("block", values(2)).read(), values(2))


def test_a_folder_that_is_gone_is_named_and_tried_again(tmp_path):
    folder = tmp_path / "scratch"
    offloader = Offloader(OffloadOptions(directory=folder))
    with pytest.raises(OffloadError, match=f"made in {folder}: No such file or directory"):
        offloader.put("block", values(1))
    folder.mkdir()
    kept = offloader.put("block", values(1))
    assert list(folder.iterdir()) == []  # the file has no name
    folder.rmdir()
    assert torch.equal(kept.read(), values(1))
    assert torch.equal(offloader.put("block", values(2)).read(), values(2))


def test_the_folder_is_the_option_or_the_variable_or_the_systems(tmp_path, monkeypatch):
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    assert OffloadOptions().folder() == Path(tempfile.gettempdir())
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    assert OffloadOptions().folder() == tmp_path
    assert OffloadOptions(directory="/elsewhere").folder() == Path("/elsewhere")


def test_options_that_cannot_work_are_refused():
    for options in ({"max_writing_bytes": -1}, {"slab_bytes": 0}, {"timeout_s": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            OffloadOptions(**options)


def test_tensors_of_a_device_without_a_store_are_refused(offloader):
    with pytest.raises(OffloadError, match="meta"):
        offloader.put("block", torch.empty(4, device="meta"))


def test_a_write_that_hangs_is_an_error_after_the_time_limit(tmp_path):
    offloader = Offloader(OffloadOptions(directory=tmp_path, timeout_s=0.01))
    kept = offloader.put("block", values(1))
    write = kept._write
    write.wait()
    write._ended.clear()  # as if the thread that claimed it were still at it
    write.wait()
    assert write.failure is not None
    assert "no answer within 0.01 s" in write.failure[0]


def test_threads_and_file_end_with_the_last_owner(tmp_path):
    offloader = Offloader(OffloadOptions(directory=tmp_path))
    before = set(threading.enumerate())
    kept = offloader.put("block", values(1))
    threads = set(threading.enumerate()) - before
    assert {thread.name for thread in threads} == {"mlsys-offload-write", "mlsys-offload-read"}
    assert all(thread.daemon for thread in threads)
    file = weakref.ref(store_of(offloader)._file)
    descriptor = file().descriptor
    del offloader
    assert torch.equal(kept.read(), values(1))  # what was kept owns them, too
    del kept
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert file() is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_copies_and_pickles_have_the_options_alone(offloader):
    offloader.put("block", values(1))
    for other in (copy.deepcopy(offloader), pickle.loads(pickle.dumps(offloader))):
        assert other.options == offloader.options
        assert torch.equal(other.put("block", values(2)).read(), values(2))
        assert store_of(other) is not store_of(offloader)


def test_the_bandwidth_is_measured_without_leaving_anything(tmp_path):
    found = measure_bandwidth(CPU, OffloadOptions(directory=tmp_path), num_bytes=1 << 20)
    assert found.write_bytes_per_s > 0
    assert found.read_bytes_per_s > 0


def fork_with_offloaded_tensors(rank: int, world_size: int, folder: str) -> int:
    torch.set_num_threads(1)
    offloader = Offloader(OffloadOptions(directory=folder, max_writing_bytes=1 << 20))
    kept = [offloader.put("block", values(number)) for number in range(3)]
    child = os.fork()
    if child == 0:
        try:
            with pytest.raises(OffloadError, match="before a fork"):
                kept[0].read()
            own = [offloader.put("block", values(10 + number)) for number in range(3)]
            kept.clear()
            gc.collect()
            right = all(torch.equal(one.read(), values(10 + number)) for number, one in enumerate(own))
            os._exit(0 if right else 2)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert all(torch.equal(one.read(), values(number)) for number, one in enumerate(kept))
    return os.waitstatus_to_exitcode(status)


def test_a_forked_process_has_a_file_and_threads_of_its_own(run_ranks, tmp_path):
    assert run_ranks(fork_with_offloaded_tensors, 1, str(tmp_path), init=False) == [0]
