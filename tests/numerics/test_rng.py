from __future__ import annotations

import torch

from mlsys_engine.numerics import derived_seed, seed_data_rank


def test_derived_seeds_are_fixed_for_ever_and_differ_by_every_part():
    assert derived_seed(0, "data_rank", 0) == 4350275550695324218
    seeds = {derived_seed(seed, "data_rank", rank) for seed in range(20) for rank in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 11) != derived_seed(11, 1)


def test_a_data_rank_draws_the_same_again_and_not_what_another_draws():
    draws = []
    with torch.random.fork_rng(devices=[]):
        for rank in (0, 1, 0):
            seed_data_rank(3, rank)
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
