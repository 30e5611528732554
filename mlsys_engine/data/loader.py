"""Reads a user's DataLoader: what is kept of it, and what the engine cannot honour and therefore refuses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from mlsys_engine.errors import DataError


def check_loader(loader: Any) -> DataLoader[Any]:
    """The loader itself, once nothing in it would be lost by rebuilding it; DataError otherwise."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise DataError(
            f"A {type(loader).__name__} was given as the loader.",
            "The engine rebuilds a torch.utils.data.DataLoader around its own resumable sampler, and another "
            "class's way of iterating would be lost.",
            "Give a plain torch.utils.data.DataLoader that yields the global batch.",
        )
    if loader.batch_size is None and (
        loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler
    ):
        raise DataError(
            "The loader has batch_size=None.",
            "The loader's batch_size is the global batch of one optimizer step.",
            "Set batch_size on the DataLoader and let it do the batching.",
        )
    if not getattr(loader, "in_order", True):
        raise DataError(
            "The loader has in_order=False.",
            "Samples in an exact order are what makes a run resumable.",
            "Leave in_order at its default.",
        )
    if not isinstance(loader.dataset, IterableDataset):
        _check_samplers(loader)
    return loader


def shuffles(loader: DataLoader[Any]) -> bool:
    """Whether a checked map-style loader asks for a random order."""
    return type(loader.sampler) is RandomSampler


def kept_settings(loader: DataLoader[Any]) -> Mapping[str, Any]:
    """The arguments of a rebuilt loader that do not decide which samples it gives."""
    kept: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
    }
    if loader.num_workers:
        kept |= {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "persistent_workers": loader.persistent_workers,
        }
    return kept


def _check_samplers(loader: DataLoader[Any]) -> None:
    if type(loader.batch_sampler) is not BatchSampler:
        raise _custom_sampler("batch_sampler", loader.batch_sampler)
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no length.",
            "A map-style dataset says how many samples it has.",
            "Give it a __len__ method.",
        )
    num_samples = len(dataset)
    if type(sampler) not in (SequentialSampler, RandomSampler):
        raise _custom_sampler("sampler", sampler)
    if len(sampler) != num_samples or getattr(sampler, "replacement", False):
        raise DataError(
            f"The loader's {type(sampler).__name__} draws {len(sampler)} samples of a dataset of "
            f"{num_samples}"
            f"{' with replacement' if getattr(sampler, 'replacement', False) else ''}.",
            "The engine gives each sample exactly once an epoch.",
            "Use shuffle=True or False, and torch.utils.data.Subset to choose samples.",
        )
    if loader.generator is not None or getattr(sampler, "generator", None) is not None:
        warnings.warn(
            "The loader's generator has no effect: the order of the samples comes from the engine's seed, so "
            "that every rank and every resumed run knows it. Set the seed instead.",
            stacklevel=4,
        )


def _custom_sampler(kind: str, sampler: object) -> DataError:
    return DataError(
        f"The loader has a custom {kind}, {type(sampler).__name__}.",
        "The engine shards the global batch over the ranks itself, with a sampler that it can resume, in the "
        "dataset's order (shuffle=False) or shuffled (shuffle=True).",
        "Remove the sampler (a DistributedSampler is not needed); to choose or repeat samples, wrap the "
        "dataset in torch.utils.data.Subset(dataset, indices).",
    )
