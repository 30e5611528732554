"""Who owns what, what is loaded ahead, when a put waits: with transfers that end when the test says so."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from mlsys_engine.activation.offload import OffloadError
from mlsys_engine.activation.offload.extents import Extents
from mlsys_engine.activation.offload.lane import Lane
from mlsys_engine.memory import SavedActivationMeter, current_observer
from tests.activation.slow_store import NUMEL, SlowStore, put_blocks, values


def test_reading_the_last_block_loads_it_and_the_one_before_in_the_order_of_the_backward():
    store = SlowStore()
    kept = put_blocks(lane := Lane(store, max_writing_bytes=0))
    assert torch.equal(kept.pop().read(), values(7))
    assert store.loads == [7, 6, 5, 4]
    kept.pop().read()
    assert store.loads == [7, 6, 5, 4]  # the same block: nothing more
    kept.pop().read()
    assert store.loads == [7, 6, 5, 4, 3, 2]  # one block ahead
    for one in (kept.pop(), kept.pop(), kept.pop()):
        one.read()
    assert store.loads == [7, 6, 5, 4, 3, 2, 1, 0]
    assert lane.writing_bytes == 0


def test_readings_that_go_back_and_forth_between_blocks_load_nothing_twice():
    store = SlowStore()
    kept = put_blocks(Lane(store, max_writing_bytes=0))
    for number in (7, 5, 6, 4):
        kept[number].read()
    assert sorted(store.loads) == sorted(set(store.loads))


def test_a_second_backward_loads_ahead_again():
    store = SlowStore()
    kept = put_blocks(Lane(store, max_writing_bytes=0), num_blocks=2)
    for _ in range(2):
        store.loads.clear()
        for number in (3, 2, 1, 0):
            assert torch.equal(kept[number].read(), values(number))
            assert store.loads == [3, 2, 1, 0]


def test_a_tensor_that_is_not_written_yet_is_read_without_a_transfer():
    store = SlowStore()
    kept = put_blocks(Lane(store, max_writing_bytes=1 << 20), num_blocks=1)
    source = store.writes[1].tensor
    assert source is not None
    assert kept[1].read().data_ptr() == source.data_ptr()
    store.writes[0].end()  # after the first reading: what it holds ahead needs no load
    assert torch.equal(kept[0].read(), values(0))
    assert store.loads == []


@pytest.mark.parametrize("limit", [0, 1, 4 * NUMEL, 10 * NUMEL, 40 * NUMEL])
def test_no_more_than_the_limit_is_on_the_way_after_a_put(limit):
    store = SlowStore()
    lane = Lane(store, max_writing_bytes=limit)
    kept = []
    for number in range(20):
        kept.append(lane.put(number, values(number), None))
        waiting = sum(write.num_bytes for write in store.writes if not write.has_ended())
        assert waiting == lane.writing_bytes == min(limit // (4 * NUMEL), number + 1) * 4 * NUMEL
        assert waiting == sum(one.num_bytes_on_device for one in kept)
    assert len(store.waits) == 20 - min(limit // (4 * NUMEL), 20)  # it does not wait more often than it must


def test_the_source_is_held_until_it_is_written_and_no_longer():
    store = SlowStore()
    lane = Lane(store, max_writing_bytes=1 << 20)
    source = values(1)
    storage = weakref.ref(source.untyped_storage())
    kept = lane.put("block", source, None)
    del source
    assert storage() is not None
    store.writes[0].end()
    assert storage() is None
    assert torch.equal(kept.read(), values(1))


def test_a_tensor_that_nobody_wants_any_more_is_neither_written_nor_held():
    store = SlowStore()
    lane = Lane(store, max_writing_bytes=1 << 20)
    kept = put_blocks(lane)
    kept.clear()
    assert lane.writing_bytes == 0
    assert store.extents.end == 0
    assert all(write.is_unwanted for write in store.writes)


def test_free_parts_are_joined_and_the_first_that_fits_is_taken():
    extents = Extents()
    starts = [extents.take(4096) for _ in range(5)]
    assert starts == [0, 4096, 8192, 12288, 16384]
    for start in (4096, 12288, 8192):  # between both neighbours last
        extents.give_back(start, 4000)
    assert extents.take(3 * 4096 + 1) == 5 * 4096  # too large for the hole
    assert extents.take(3 * 4096) == 4096
    assert [extents.take(0), extents.take(0)] == [9 * 4096, 10 * 4096]  # nothing has a place of its own, too
    for start, size in ((0, 1), (4096, 12288), (16384, 1), (20480, 12289), (36864, 0), (40960, 0)):
        extents.give_back(start, size)
    assert extents.end == 0


def test_a_line_with_an_end_says_when_it_is_full():
    extents = Extents(2 * 4096)
    assert extents.take(4097) == 0
    assert extents.take(1) is None
    extents.give_back(0, 4097)
    assert extents.take(1) == 0


def test_the_meter_counts_what_is_on_the_device():
    store = SlowStore()
    lane = Lane(store, max_writing_bytes=1 << 20)
    with SavedActivationMeter() as meter:
        kept = [lane.put(number, values(number), current_observer()) for number in range(3)]
        assert meter.current_bytes == 3 * 4 * NUMEL  # all wait to be written
        for write in store.writes:
            write.end()
        lane.begin_backward()  # which looks after what is written, and loads one
        assert meter.current_bytes == 4 * NUMEL
        kept[2].read()
        assert meter.current_bytes == 4 * NUMEL  # what was read has left, the one before it has been loaded
        kept[1].read()
        kept[0].read()
        assert meter.current_bytes == 0
        assert meter.peak_bytes == 3 * 4 * NUMEL


def test_a_failure_is_told_once_where_tensors_are_put_and_always_where_they_are_read():
    store = SlowStore()
    kept = put_blocks(lane := Lane(store, max_writing_bytes=1 << 20), num_blocks=2)
    store.is_broken = True
    for write in store.writes:
        write.end()
    with pytest.raises(OffloadError, match="broken"):
        lane.put("block", values(5), None)
    store.is_broken = False
    assert torch.equal(lane.put("block", values(6), None).read(), values(6))
    for one in kept * 2:
        with pytest.raises(OffloadError, match="broken"):
            one.read()
    assert lane.writing_bytes == 0


@pytest.mark.parametrize("how", ["read", "dropped"])
def test_a_failure_of_this_step_is_not_told_the_next_one(how):
    store = SlowStore()
    kept = put_blocks(lane := Lane(store, max_writing_bytes=1 << 20), num_blocks=2)
    store.is_broken = True
    if how == "read":
        store.writes[0].end()
        with pytest.raises(OffloadError, match="broken"):
            kept[0].read()  # the others have failed by now, too, and live on
    else:
        for write in store.writes:
            write.end()
        lane.begin_backward()  # sees it, and has nobody to tell
        kept.clear()
    store.is_broken = False
    assert torch.equal(lane.put("block", values(6), None).read(), values(6))


def test_a_tensor_that_could_not_be_read_may_be_read_again_later():
    store = SlowStore()
    kept = put_blocks(Lane(store, max_writing_bytes=0), num_blocks=1)
    store.is_broken = True
    with pytest.raises(OffloadError, match="broken"):
        kept[0].read()
    store.is_broken = False
    assert torch.equal(kept[0].read(), values(0))


def test_a_kept_tensor_may_die_in_the_collector_while_the_lane_is_at_work():
    store = SlowStore()
    lane = Lane(store, max_writing_bytes=1 << 20)
    cycle: list[Any] = [lane.put("block", values(1), None)]
    cycle.append(cycle)

    def collecting(_: Tensor) -> None:
        cycle.clear()
        gc.collect()

    kept = lane.put("block", values(2), collecting)  # under the lane's lock
    assert torch.equal(kept.read(), values(2))
    assert store.extents.take(1) == 0  # the dead one's slot is free
