"""The order of an epoch: a permutation for every size, asked for by position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.data.permutation import combine, mix, permute


@pytest.mark.parametrize("num_samples", [1, 2, 3, 63, 64, 65, 1000, 4096, 4097, 65537])
def test_every_index_stands_at_exactly_one_position(num_samples):
    indices = permute(np.arange(num_samples), num_samples, key=7)
    assert np.array_equal(np.sort(indices), np.arange(num_samples))


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1), st.data())
def test_a_position_asked_for_alone_is_that_of_the_whole(num_samples, key, data):
    position = data.draw(st.integers(0, num_samples - 1))
    whole = permute(np.arange(num_samples), num_samples, key)
    assert permute(np.array([position]), num_samples, key)[0] == whole[position]


def test_a_position_of_a_huge_dataset_costs_no_memory():
    num_samples = 10**13
    indices = permute(np.array([0, 1, num_samples - 1]), num_samples, key=3)
    assert len(set(indices.tolist())) == 3
    assert ((indices >= 0) & (indices < num_samples)).all()


def test_all_orders_of_a_tiny_dataset_are_about_equally_likely():
    num_keys = 1200
    counts: dict[tuple[int, ...], int] = {}
    for key in range(num_keys):
        order = tuple(permute(np.arange(4), 4, mix(key)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    # Chi-squared with 23 degrees of freedom exceeds 58 with probability 1e-4; the keys are fixed.
    expected = num_keys / 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 58


def test_orders_of_different_keys_are_unrelated():
    first, second = (permute(np.arange(10_000), 10_000, combine(seed, 0)) for seed in (0, 1))
    # The correlation of two random orders has a standard deviation of 1/sqrt(10000); allow five of them.
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert (first == second).sum() < 10


def test_the_order_is_pinned():
    # Changing it would break the resumption of every saved run: it needs a version in the sampler's state.
    assert permute(np.arange(8), 8, combine(0, 0)).tolist() == [4, 7, 6, 5, 3, 2, 1, 0]


def test_a_combined_key_depends_on_the_order_of_its_parts():
    assert len({combine(1, 2), combine(2, 1), combine(1), combine(2), combine(1, 2, 0)}) == 5


def test_negative_and_large_seeds_are_keys_too():
    assert combine(-1, 3) != combine(1, 3)
    assert 0 <= combine(2**80, 3) < 2**64
