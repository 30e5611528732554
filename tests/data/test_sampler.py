"""The sample-indexed sampler: what it gives at a position depends on (seed, epoch, position) alone."""

from __future__ import annotations

import itertools

import pytest

from mlsys_engine.data.sampler import SampleSampler
from mlsys_engine.errors import DataError


def test_an_epoch_gives_every_sample_once_and_the_next_in_another_order():
    sampler = SampleSampler(50, shuffle=True, seed=1)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert sampler.epoch == 2


def test_without_shuffle_the_order_is_the_datasets():
    sampler = SampleSampler(5, shuffle=False)
    assert list(sampler) == list(range(5))
    assert sampler.indices(3, range(2, 4)) == [2, 3]


def test_two_samplers_of_one_seed_agree_and_of_two_seeds_do_not():
    orders = [list(SampleSampler(40, shuffle=True, seed=seed)) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("position", range(8))
def test_iteration_resumes_at_every_position(position):
    whole = SampleSampler(7, shuffle=True, seed=2)
    expected = list(whole) + list(whole)
    stopped = SampleSampler(7, shuffle=True, seed=2)
    list(itertools.islice(stopped, position))
    resumed = SampleSampler(7, shuffle=True, seed=99)
    resumed.load_state_dict(stopped.state_dict())
    # After the last sample the epoch may or may not have been closed; the next one follows either way.
    assert (list(resumed) + list(resumed))[: 14 - position] == expected[position:]


def test_positions_across_blocks_are_those_of_single_positions():
    sampler = SampleSampler(20_000, shuffle=True, seed=5)
    positions = range(8190, 8195)
    assert sampler.indices(1, positions) == [
        SampleSampler(20_000, shuffle=True, seed=5).indices(1, range(position, position + 1))[0]
        for position in positions
    ]


def test_a_samples_own_seed_changes_with_seed_epoch_and_position():
    seeds = {
        seed_of
        for seed in (0, 1)
        for epoch in (0, 1)
        for seed_of in SampleSampler(4, shuffle=True, seed=seed).sample_seeds(epoch, range(4))
    }
    assert len(seeds) == 16


def test_moving_within_the_present_epoch_keeps_the_position():
    sampler = SampleSampler(5, shuffle=True)
    next(iter(sampler))
    sampler.set_epoch(0)
    assert sampler.position == 1
    sampler.set_epoch(4)
    assert (sampler.epoch, sampler.position) == (4, 0)


@pytest.mark.parametrize("change", [{"num_samples": 6}, {"shuffle": False}])
def test_a_state_of_other_data_or_order_is_refused(change):
    state = SampleSampler(5, shuffle=True).state_dict() | change
    with pytest.raises(DataError, match=next(iter(change))):
        SampleSampler(5, shuffle=True).load_state_dict(state)


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="0 samples"):
        SampleSampler(0, shuffle=True)
