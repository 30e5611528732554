"""Evaluation batches of one rank: every sample once over all ranks, and the same number of turns on each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from mlsys_engine.data.layout import BatchLayout
from mlsys_engine.data.loader import check_loader
from mlsys_engine.data.sampler import SampleSampler
from mlsys_engine.data.sources import MapSource, StreamSource, samples_per_epoch


def evaluation_shares(loader: DataLoader[Any], data_rank: int, num_data_shards: int) -> Iterator[Any | None]:
    """Gives this rank's share of each global batch of `loader`, or None where it has none, once through.

    Samples come in the dataset's order even when the loader shuffles: a sum over all of them does not depend
    on it, and a repeated evaluation then adds in the same order. The loader's drop_last is kept. The batch
    may be smaller than the ranks. All ranks iterate equally often, so each may call collectives in every
    turn.
    """
    loader = check_loader(loader)
    num_samples = samples_per_epoch(loader, num_data_shards)
    sampler = SampleSampler(num_samples, shuffle=False)
    assert loader.batch_size is not None  # check_loader
    layout = BatchLayout(
        num_samples=num_samples,
        global_batch_size=loader.batch_size,
        num_data_shards=num_data_shards,
        data_rank=data_rank,
        drop_last=loader.drop_last,
    )
    is_stream = isinstance(loader.dataset, IterableDataset)
    return _shares(StreamSource(loader, layout) if is_stream else MapSource(loader, layout, sampler), layout)


def _shares(source: MapSource | StreamSource, layout: BatchLayout) -> Iterator[Any | None]:
    shares = source.microbatches(0, 0)
    for batch in layout.batches_from(0):
        yield next(shares) if layout.rank_share(batch) else None
