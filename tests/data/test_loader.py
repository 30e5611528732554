"""Loaders whose samples the engine could not give exactly as asked are refused, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from mlsys_engine.data import GlobalBatches, evaluation_shares
from mlsys_engine.errors import DataError
from tests.data.datasets import Numbers

DATASET = Numbers(6)


class OwnIteration(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(())


class Lengthless:
    def __getitem__(self, index: int) -> int:
        return index


REFUSED = {
    "a dataset without a length": (DataLoader(Lengthless(), batch_size=2), "Lengthless has no length"),  # type: ignore[arg-type]
    "a list of batches": ([1, 2], "list was given"),
    "a loader that iterates in its own way": (OwnIteration(DATASET, batch_size=2), "OwnIteration"),
    "no batch size": (DataLoader(DATASET, batch_size=None), "batch_size=None"),
    "a distributed sampler": (
        DataLoader(DATASET, batch_size=2, sampler=DistributedSampler(DATASET, 2, 0)),
        "DistributedSampler.*Remove the sampler",
    ),
    "a subset sampler": (DataLoader(DATASET, batch_size=2, sampler=SubsetRandomSampler([1])), "Subset\\("),
    "a weighted sampler": (
        DataLoader(DATASET, sampler=WeightedRandomSampler([1.0] * 6, 6)),
        "custom sampler",
    ),
    "a list as sampler": (DataLoader(DATASET, batch_size=2, sampler=[1, 2]), "custom sampler, list"),
    "a batch sampler": (
        DataLoader(DATASET, batch_sampler=[[0, 1], [2]]),  # type: ignore[arg-type]
        "custom batch_sampler, list",
    ),
    "sampling with replacement": (
        DataLoader(DATASET, sampler=RandomSampler(DATASET, replacement=True)),
        "with replacement",
    ),
    "fewer samples than the dataset has": (
        DataLoader(DATASET, sampler=RandomSampler(DATASET, num_samples=4)),
        "draws 4 samples of a dataset of 6",
    ),
    "a sampler of other data": (DataLoader(DATASET, sampler=SequentialSampler(range(3))), "draws 3"),
    "batches out of order": (DataLoader(DATASET, batch_size=2, in_order=False), "in_order"),
    "an empty dataset": (DataLoader(Numbers(0), batch_size=2), "0 samples"),
    "only an incomplete batch to drop": (DataLoader(DATASET, batch_size=7, drop_last=True), "do not fill"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_refuses(name):
    loader, words = REFUSED[name]
    with pytest.raises(DataError, match=words) as caught:
        GlobalBatches(loader, data_rank=0, num_data_shards=1)
    assert caught.value.given
    assert caught.value.expected
    assert caught.value.action


@pytest.mark.parametrize("name", REFUSED)
def test_evaluation_refuses_before_the_first_turn(name):
    loader, words = REFUSED[name]
    with pytest.raises(DataError, match=words):
        evaluation_shares(loader, 0, 1)


def test_a_plain_batch_sampler_of_a_plain_sampler_is_not_known_to_the_loader_as_batch_size():
    sampler = BatchSampler(SequentialSampler(DATASET), 2, False)
    with pytest.raises(DataError, match="batch_size=None"):
        GlobalBatches(DataLoader(DATASET, batch_sampler=sampler), data_rank=0, num_data_shards=1)


def test_a_generator_that_would_have_no_effect_is_announced():
    loader = DataLoader(DATASET, batch_size=2, shuffle=True, generator=torch.Generator())
    with pytest.warns(UserWarning, match="generator has no effect"):
        GlobalBatches(loader, data_rank=0, num_data_shards=1)
