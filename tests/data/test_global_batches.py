"""A rank's share of every global batch, and resumption at any of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset

from mlsys_engine.data import GlobalBatches
from mlsys_engine.errors import DataError
from tests.data.datasets import Noisy, NoisyInBatches, Numbers, RaggedTexts, as_pair, pad, seeded_worker


def batches_of(loader: DataLoader[Any], rank: int = 0, shards: int = 1, **settings: Any) -> GlobalBatches:
    return GlobalBatches(loader, data_rank=rank, num_data_shards=shards, **settings)


def numbers(share: list[torch.Tensor]) -> list[int]:
    return [int(number) for microbatch in share for number in microbatch]


def epoch_of(size: int, shards: int, **settings: Any) -> list[list[int]]:
    """One epoch's global batches, put together again from the shares of all ranks."""
    loader = DataLoader(Numbers(size), batch_size=settings.pop("batch_size"), shuffle=True)
    ranks = [batches_of(loader, rank, shards, **settings) for rank in range(shards)]
    return [[number for share in shares for number in numbers(share)] for shares in zip(*ranks, strict=True)]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.data())
def test_global_batches_do_not_depend_on_ranks_or_accumulation(size, batch_size, data):
    shards = data.draw(st.integers(1, min(batch_size, 5)))
    accumulate = data.draw(st.integers(1, -(-batch_size // shards)))
    alone = epoch_of(size, 1, batch_size=batch_size, seed=3)
    assert epoch_of(size, shards, batch_size=batch_size, seed=3, accumulate=accumulate) == alone
    assert sorted(itertools.chain(*alone)) == list(range(size))


def test_a_last_batch_smaller_than_the_ranks_gives_some_an_empty_list():
    loader = DataLoader(Numbers(9), batch_size=4)
    shares = [list(batches_of(loader, rank, 4, accumulate=1))[-1] for rank in range(4)]
    assert [numbers(share) for share in shares] == [[8], [], [], []]
    assert shares[1] == []


def test_accumulation_cuts_the_share_and_does_not_enlarge_it():
    batches = batches_of(DataLoader(Numbers(16), batch_size=8), 1, 2, accumulate=3)
    first = next(iter(batches))
    assert [microbatch.tolist() for microbatch in first] == [[4, 5], [6], [7]]
    assert (batches.global_batch_size, batches.per_rank_batch_size) == (8, 4)
    assert batches.batches_per_epoch == len(batches) == 2


def test_uneven_ranks_know_their_own_batch_size():
    loader = DataLoader(Numbers(10), batch_size=5)
    assert [batches_of(loader, rank, 3).per_rank_batch_size for rank in range(3)] == [2, 2, 1]


def test_drop_last_of_the_loader_is_kept():
    batches = batches_of(DataLoader(Numbers(10), batch_size=4, drop_last=True))
    assert [numbers(share) for share in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_subset_is_sharded_as_any_dataset():
    batches = batches_of(DataLoader(Subset(Numbers(10), [7, 1, 5]), batch_size=3))
    assert [numbers(share) for share in batches] == [[7, 1, 5]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ragged_dict_batches_pass_through_the_users_collate(num_workers):
    loader = DataLoader(RaggedTexts(9), batch_size=4, collate_fn=pad, num_workers=num_workers)
    shares = list(batches_of(loader, 1, 2))
    assert shares[0][0]["input_ids"].tolist() == [[2, 2, 2, -1], [3, 3, 3, 3]]
    assert shares[0][0]["labels"].tolist() == [[2, 2, 2, -100], [3, 3, 3, 3]]
    assert shares[2] == []


def test_tuple_batches_pass_through_the_users_collate():
    loader = DataLoader(RaggedTexts(4), batch_size=4, collate_fn=as_pair)
    [[(padded, lengths)]] = list(batches_of(loader))
    assert (padded.shape, lengths) == ((4, 4), [1, 2, 3, 4])


@pytest.mark.parametrize("num_received", range(9))
def test_resuming_after_every_batch_gives_the_rest_of_the_run(num_received):
    loader = DataLoader(Numbers(10), batch_size=3, shuffle=True)
    whole = batches_of(loader, seed=5)
    expected = [numbers(share) for _ in range(2) for share in whole]
    stopped = batches_of(loader, seed=5)
    turns = itertools.chain.from_iterable(stopped for _ in range(2))
    received = [numbers(share) for share in itertools.islice(turns, num_received)]
    resumed = batches_of(loader, seed=0)
    resumed.load_state_dict(stopped.state_dict())
    rest = []
    while resumed.epoch < 2:
        rest += [numbers(share) for share in resumed]
    assert received + rest == expected


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2), (2, 1)])
def test_another_world_size_continues_at_the_same_global_sample(before, after):
    loader = DataLoader(Numbers(20), batch_size=6, shuffle=True)
    alone = [numbers(share) for share in batches_of(loader, seed=1)]
    stopped = batches_of(loader, 0, before, seed=1)
    next(iter(stopped))
    state = stopped.state_dict()
    assert state["sample"] == 6
    ranks = [batches_of(loader, rank, after, seed=8) for rank in range(after)]
    for rank in ranks:
        rank.load_state_dict(state)
    rest = [[n for share in shares for n in numbers(share)] for shares in zip(*ranks, strict=True)]
    assert rest == alone[1:]


def test_another_batch_size_continues_at_the_same_global_sample():
    stopped = batches_of(DataLoader(Numbers(10), batch_size=4))
    next(iter(stopped))
    resumed = batches_of(DataLoader(Numbers(10), batch_size=3))
    resumed.load_state_dict(stopped.state_dict())
    assert [numbers(share) for share in resumed] == [[4, 5, 6], [7, 8, 9]]


def test_a_state_taken_after_the_last_batch_continues_with_the_next_epoch():
    loader = DataLoader(Numbers(4), batch_size=2, shuffle=True)
    stopped = batches_of(loader)
    list(itertools.islice(stopped, 2))
    resumed = batches_of(loader)
    resumed.load_state_dict(stopped.state_dict())
    assert (resumed.epoch, resumed.sample) == (1, 0)
    assert len(list(resumed)) == 2


def test_all_ranks_have_the_same_state_and_it_is_plain_values():
    loader = DataLoader(Numbers(7), batch_size=3, shuffle=True)
    states = []
    for rank in range(2):
        batches = batches_of(loader, rank, 2)
        next(iter(batches))
        states.append(batches.state_dict())
    assert states[0] == states[1]
    assert all(type(value) in (int, bool) for value in states[0].values())


def test_another_dataset_is_refused_when_resuming():
    state = batches_of(DataLoader(Numbers(4), batch_size=2)).state_dict()
    with pytest.raises(DataError, match="num_samples=4"):
        batches_of(DataLoader(Numbers(5), batch_size=2)).load_state_dict(state)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_prefetching_ahead_do_not_move_the_position(persistent):
    loader = DataLoader(
        Numbers(12),
        batch_size=2,
        shuffle=True,
        num_workers=2,
        persistent_workers=persistent,
        prefetch_factor=3,
    )
    plain = batches_of(DataLoader(Numbers(12), batch_size=2, shuffle=True), seed=4)
    expected = [numbers(share) for _ in range(2) for share in plain]
    stopped = batches_of(loader, seed=4)
    received = [numbers(share) for share in itertools.islice(stopped, 2)]
    resumed = batches_of(loader, seed=4)
    resumed.load_state_dict(stopped.state_dict())
    assert received + [numbers(share) for _ in range(2) for share in resumed] == expected


@pytest.mark.parametrize("dataset", [Noisy(9), NoisyInBatches(9)])
def test_random_augmentation_in_workers_is_the_same_after_a_resume(dataset):
    def loader(num_workers: int) -> DataLoader[Any]:
        return DataLoader(
            dataset, batch_size=3, shuffle=True, num_workers=num_workers, worker_init_fn=seeded_worker
        )

    whole = [torch.cat(share) for share in batches_of(loader(2), seed=6)]
    stopped = batches_of(loader(2), seed=6)
    next(iter(stopped))
    resumed = batches_of(loader(1), seed=6)
    resumed.load_state_dict(stopped.state_dict())
    rest = [torch.cat(share) for share in resumed]
    assert all(torch.equal(left, right) for left, right in zip(whole[1:], rest, strict=True))
    assert len({float(value) for value in torch.cat(whole)[:, 1:].flatten()}) == 27


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterating_does_not_touch_the_global_random_generator(num_workers):
    before = torch.get_rng_state()
    list(batches_of(DataLoader(Numbers(4), batch_size=2, shuffle=True, num_workers=num_workers)))
    assert torch.equal(before, torch.get_rng_state())


def test_leaving_an_epoch_early_continues_it_and_set_epoch_leaves_it():
    batches = batches_of(DataLoader(Numbers(6), batch_size=2))
    assert numbers(next(iter(batches))) == [0, 1]
    assert numbers(next(iter(batches))) == [2, 3]
    batches.set_epoch(1)
    assert numbers(next(iter(batches))) == [0, 1]
    assert batches.epoch == 1


def test_a_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(DataError, match=r"batch_size=2.*3 data-parallel ranks.*Set batch_size to 3"):
        batches_of(DataLoader(Numbers(6), batch_size=2), 0, 3)
