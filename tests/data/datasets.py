"""Small datasets for these tests, at module level so that worker processes can load them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset


class Numbers(Dataset[torch.Tensor]):
    """Sample i is the number i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class RaggedTexts(Numbers):
    """Sample i has i % 4 + 1 tokens, all i."""

    def __getitem__(self, index: int) -> Any:
        return {"input_ids": torch.full((index % 4 + 1,), index)}


class Noisy(Numbers):
    """Sample i with random numbers of the three generators that augmentations use."""

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class NoisyInBatches(Noisy):
    """The same, fetched a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class Stream(IterableDataset[torch.Tensor]):
    """A stream that says nothing about shards."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(12))


class ShardedStream(IterableDataset[torch.Tensor]):
    """Shard r of S gives epoch * 100 + r, r + S, ...; it may declare more than it gives."""

    def __init__(self, rank: int, num_shards: int, declared: int, given: int | None = None) -> None:
        self.rank, self.num_shards = rank, num_shards
        self.samples_per_shard, self.given = declared, declared if given is None else given
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(self.given):
            yield torch.tensor(self.epoch * 100 + self.rank + number * self.num_shards)


def pad(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pads to the longest sample; labels are -100 where padded."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [s["input_ids"] for s in samples], batch_first=True, padding_value=-1
    )
    return {"input_ids": ids, "labels": ids.masked_fill(ids < 0, -100)}


def as_pair(samples: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, list[int]]:
    """A tuple of a padded tensor and a list."""
    padded = pad(samples)["input_ids"]
    return padded, [len(s["input_ids"]) for s in samples]


def seeded_worker(worker_id: int) -> None:
    """A worker_init_fn that reads its worker's dataset."""
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert info.dataset.size == 9
