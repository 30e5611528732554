"""Where a rank's microbatches come from: a map-style dataset by index, or a stream that is sharded
already."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from mlsys_engine.data.layout import BatchLayout
from mlsys_engine.data.loader import kept_settings
from mlsys_engine.data.sampler import SampleSampler
from mlsys_engine.errors import DataError


class MicrobatchSource(Protocol):
    """Gives this rank's microbatches of an epoch one after the other."""

    def microbatches(self, epoch: int, sample: int) -> Iterator[Any]:
        """Those of the layout's batches after `sample` global samples of `epoch`."""


class MapSource:
    """Microbatches of a map-style dataset, loaded by a rebuilt DataLoader with the user's workers and
    collate_fn.

    In worker processes every sample is loaded with random, numpy and torch seeded by its position, so
    augmentation and masking do not depend on which worker loads it or on where the run was resumed. Without
    workers they draw from the process's own generators, which belong to the trainer.
    """

    def __init__(self, loader: DataLoader[Any], layout: BatchLayout, sampler: SampleSampler) -> None:
        self._shares = _ShareSampler(layout, sampler, seeded=loader.num_workers > 0)
        dataset = _SeededSamples(loader.dataset) if loader.num_workers else loader.dataset
        # Its own generator: a DataLoader draws its workers' base seed, and drawing it from the global
        # generator would shift the model's dropout between a run and its resumed copy.
        self._loader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=self._shares, generator=torch.Generator(), **kept_settings(loader)
        )

    def microbatches(self, epoch: int, sample: int) -> Iterator[Any]:
        self._shares.start = (epoch, sample)
        return iter(self._loader)


class StreamSource:
    """Microbatches of an IterableDataset that gives this rank its own shard (see GlobalBatches)."""

    def __init__(self, loader: DataLoader[Any], layout: BatchLayout) -> None:
        if loader.num_workers > 1:
            raise DataError(
                f"An IterableDataset with num_workers={loader.num_workers}.",
                "Several workers would each give the whole stream, in an order that cannot be resumed.",
                "Set num_workers to 0 or 1, or use a map-style dataset.",
            )
        # The stream collates; a worker must begin anew where each epoch, or a resumed run, starts.
        settings = {**kept_settings(loader), "persistent_workers": False, "collate_fn": _unchanged}
        self._stream = _StreamMicrobatches(loader.dataset, layout, loader.collate_fn)
        self._loader: DataLoader[Any] = DataLoader(
            self._stream, batch_size=None, generator=torch.Generator(), **settings
        )

    def microbatches(self, epoch: int, sample: int) -> Iterator[Any]:
        self._stream.start = (epoch, sample)
        return iter(self._loader)


class _ShareSampler:
    """The batch sampler of a rank: one list of indices a microbatch, from `start` = (epoch, global sample)
    on."""

    def __init__(self, layout: BatchLayout, sampler: SampleSampler, *, seeded: bool) -> None:
        self.layout, self.sampler, self.seeded = layout, sampler, seeded
        self.start = (0, 0)

    def __iter__(self) -> Iterator[list[Any]]:
        return self._lists(*self.start)  # `start` is read now, not when the first list is asked for

    def _lists(self, epoch: int, sample: int) -> Iterator[list[Any]]:
        for batch in self.layout.batches_from(sample):
            for positions in self.layout.microbatches(batch):
                indices = self.sampler.indices(epoch, positions)
                if self.seeded:
                    yield list(zip(indices, self.sampler.sample_seeds(epoch, positions), strict=True))
                else:
                    yield indices


class _SeededSamples(Dataset[Any]):
    """Seeds the worker's generators before each sample; `(index, seed)` pairs arrive instead of indices."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        # A worker_init_fn finds this object as its worker's dataset and may read the user's attributes.
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, pair: tuple[int, int]) -> Any:
        index, seed = pair
        _seed_worker(seed)
        return self.dataset[index]

    def __getitems__(self, pairs: list[tuple[int, int]]) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None:
            return [self[pair] for pair in pairs]
        _seed_worker(pairs[0][1])
        return fetch([index for index, _ in pairs])


def _seed_worker(seed: int) -> None:
    if get_worker_info() is not None:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.random.default_generator.manual_seed(seed)


class _StreamMicrobatches(IterableDataset[Any]):
    """Groups a shard's stream into the layout's microbatches, after dropping what `start` says was
    consumed."""

    def __init__(self, stream: Dataset[Any], layout: BatchLayout, collate: Any) -> None:
        self.stream, self.layout, self.collate = stream, layout, collate
        self.start = (0, 0)

    def __iter__(self) -> Iterator[Any]:
        epoch, sample = self.start
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)
        samples = iter(self.stream)
        for _ in range(sample // self.layout.num_data_shards):
            self._next(samples)
        for batch in self.layout.batches_from(sample):
            for positions in self.layout.microbatches(batch):
                yield self.collate([self._next(samples) for _ in positions])

    def _next(self, samples: Iterator[Any]) -> Any:
        try:
            return next(samples)
        except StopIteration:
            declared = self.layout.num_samples // self.layout.num_data_shards
            raise DataError(
                f"The stream of data rank {self.layout.data_rank} ended before its "
                f"samples_per_shard={declared}.",
                "Every shard gives exactly that many samples an epoch: a rank that runs out alone would "
                "leave the others waiting.",
                "Correct samples_per_shard, or repeat samples within the shard.",
            ) from None


def _unchanged(microbatch: Any) -> Any:
    return microbatch


def samples_per_epoch(loader: DataLoader[Any], num_data_shards: int) -> int:
    """All samples of an epoch: of the dataset, or of all shards of a stream that declares its share."""
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset):
        return _samples_per_shard(dataset) * num_data_shards
    return len(dataset)


def _samples_per_shard(dataset: object) -> int:
    """The declaration that makes an IterableDataset acceptable, or DataError."""
    declared = getattr(dataset, "samples_per_shard", None)
    if not isinstance(declared, int) or isinstance(declared, bool) or declared < 1:
        raise DataError(
            f"{type(dataset).__name__} is an IterableDataset that does not say that it is sharded.",
            "Each rank would train on the same samples.",
            "Use a map-style dataset; or make the stream give each data rank its own samples and declare "
            "that with an attribute samples_per_shard: how many samples each shard gives an epoch.",
        )
    return declared


def check_same_stream(state: Mapping[str, Any], layout: BatchLayout) -> None:
    """Refuses a saved position that another number of stream shards cannot continue."""
    if state["num_data_shards"] != layout.num_data_shards:
        raise DataError(
            f"The saved run read {state['num_data_shards']} streams, this one reads "
            f"{layout.num_data_shards}.",
            "A sharded IterableDataset continues on the number of data-parallel ranks that it was started "
            "with.",
            "Launch as many ranks as before, or use a map-style dataset, which continues on any number.",
        )
