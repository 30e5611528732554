"""Pinned memory on a simulated device: no order in which the streams may run mixes tensors up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mlsys_engine.activation.offload.base import OffloadOptions
from mlsys_engine.activation.offload.lane import Kept, Lane
from mlsys_engine.activation.offload.pinned import PinnedStore
from tests.activation.simulated_streams import CPU, Machine, Stream

NUMEL = 8
TENSOR = 4 * NUMEL


@contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Machine]:
    machine = Machine(seed, num_pieces=64, piece_bytes=TENSOR)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(machine))
        patch.setattr(torch.cuda, "current_stream", lambda device: machine.current)
        patch.setattr(torch.cuda, "stream", machine.on)
        patch.setattr(torch.Tensor, "record_stream", machine.recorder())
        with machine:
            yield machine
    machine.finish()
    assert machine.wrong == []


def pinned_lane(max_writing_bytes: int) -> Lane:
    return Lane(PinnedStore(CPU, OffloadOptions(slab_bytes=8192)), max_writing_bytes)


def put(machine: Machine, lane: Lane, block: int, number: float) -> Kept:
    """The caller lets go of the source at once, and its memory may be computed with again."""
    kept = lane.put(block, machine.fill(NUMEL, number), None)
    machine.fill(NUMEL, -1.0)
    return kept


@pytest.mark.parametrize("max_writing_bytes", [0, 2 * TENSOR, 100 * TENSOR])
def test_steps_read_what_they_put_in_every_order_of_the_streams(monkeypatch, max_writing_bytes):
    for seed in range(30):
        with simulated(monkeypatch, seed) as machine:
            lane = pinned_lane(max_writing_bytes)
            for step in range(3):
                kept = [put(machine, lane, n // 2, 100.0 * step + n) for n in range(8)]
                machine.advance(machine.random.choice([0, 5, 50]))
                while kept:
                    value = kept.pop().read()
                    machine.check(value, 100.0 * step + len(kept))
                    del value
                    machine.fill(NUMEL, -2.0)
                    machine.advance(machine.random.choice([0, 0, 3]))


def test_steps_that_end_before_their_backward_leave_memory_and_slots_in_order(monkeypatch):
    for seed in range(60):
        with simulated(monkeypatch, seed) as machine:
            lane = pinned_lane(machine.random.choice([0, 2 * TENSOR, 100 * TENSOR]))
            for step in range(4):
                numbers = [100.0 * step + n for n in range(8)]
                kept = [(put(machine, lane, n // 2, number), number) for n, number in enumerate(numbers)]
                machine.random.shuffle(kept)
                for _ in range(machine.random.randrange(1, 8)):
                    machine.advance(machine.random.choice([0, 5, 50]))
                    one, number = kept.pop()
                    machine.check(one.read(), number)
                    del one
                kept.clear()  # with tensors that were loaded ahead
                machine.fill(NUMEL, -1.0)


def test_several_backwards_read_the_same(monkeypatch):
    for seed in range(30):
        with simulated(monkeypatch, seed) as machine:
            lane = pinned_lane(0)
            kept = [put(machine, lane, n, float(n)) for n in range(4)]
            for _ in range(3):
                for number in reversed(range(4)):
                    machine.check(kept[number].read(), float(number))
                    machine.fill(NUMEL, -1.0)
                    machine.advance(machine.random.choice([0, 3]))


@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_tensor_is_read_on_another_stream(monkeypatch, is_loaded):
    for seed in range(30):
        with simulated(monkeypatch, seed) as machine:
            lane = pinned_lane(0)
            kept = [put(machine, lane, n, float(n)) for n in range(3)]
            if is_loaded:
                machine.check(kept[2].read(), 2.0)
            machine.advance(machine.random.choice([0, 5, 50]))
            with machine.on(Stream(machine)):
                machine.check(kept[1].read(), 1.0)
            for _ in range(4):
                machine.fill(NUMEL, -1.0)


@pytest.mark.parametrize("is_read", [True, False])
def test_slots_are_written_again_from_another_stream(monkeypatch, is_read):
    for seed in range(30):
        with simulated(monkeypatch, seed) as machine:
            lane = pinned_lane(0)
            kept = [put(machine, lane, n, float(n)) for n in range(2)]
            found = kept[1].read()  # loads the other, too
            first = kept[0].read() if is_read else None
            kept.clear()
            with machine.on(Stream(machine)):
                others = [put(machine, lane, 2, 10.0 + n) for n in range(2)]
                machine.check(others[0].read(), 10.0)
            machine.check(found, 1.0)
            if first is not None:
                machine.check(first, 0.0)


def test_the_source_is_held_until_the_stream_that_computed_it_waits(monkeypatch):
    with simulated(monkeypatch, 0) as machine:
        lane = pinned_lane(2 * TENSOR)
        kept = [put(machine, lane, n, float(n)) for n in range(5)]
        assert [one.num_bytes_on_device for one in kept] == [0, 0, 0, TENSOR, TENSOR]
        assert lane.store.num_host_bytes == 3 * 8192


def test_pinned_memory_does_not_grow_while_the_device_is_behind(monkeypatch):
    with simulated(monkeypatch, 0) as machine:
        lane = pinned_lane(0)
        for step in range(10):
            kept = [put(machine, lane, n, 10.0 * step + n) for n in range(4)]
            while kept:
                machine.check(kept.pop().read(), 10.0 * step + len(kept))
        assert lane.store.num_host_bytes == 2 * 8192
