"""The training batches of one rank: its share of each global batch, resumable at any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from mlsys_engine.data.layout import BatchLayout
from mlsys_engine.data.loader import check_loader, shuffles
from mlsys_engine.data.sampler import SampleSampler
from mlsys_engine.data.sources import (
    MapSource,
    MicrobatchSource,
    StreamSource,
    check_same_stream,
    samples_per_epoch,
)
from mlsys_engine.errors import DataError


class GlobalBatches:
    """Rebuilds a DataLoader so that each rank iterates over its own share of the loader's batches.

    The loader's batch_size is the global batch: all samples of one optimizer step over all ranks. Iterating
    gives, for every step of an epoch, this rank's contiguous share as a list of at most `accumulate`
    microbatches. Shares differ by at most one sample; in a last batch that is smaller than the ranks some are
    empty, and so is the list.

    The order depends on (seed, epoch) alone, and the position is counted in global samples: `state_dict()`
    taken after the k-th batch was received continues with the next one, at this world size or at another.
    With `fixed_pieces` the microbatches of all ranks together are the same at any number of ranks, as long as
    ranks times `accumulate` is: they differ by at most one sample, and larger ones come first.

    When an epoch ends, `epoch` moves to the next, and iterating again gives that one.

    An IterableDataset must give each data rank its own samples and say so with an attribute
    `samples_per_shard`, the same on all ranks; it is continued by skipping, at the same number of ranks.

    Raises DataError for a loader whose samples it could not give exactly as asked.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        data_rank: int,
        num_data_shards: int,
        accumulate: int = 1,
        seed: int = 0,
        fixed_pieces: bool = False,
    ) -> None:
        loader = check_loader(loader)
        self._is_stream = isinstance(loader.dataset, IterableDataset)
        num_samples = samples_per_epoch(loader, num_data_shards)
        self._sampler = SampleSampler(
            num_samples, shuffle=not self._is_stream and shuffles(loader), seed=seed
        )
        assert loader.batch_size is not None  # check_loader
        self.layout = BatchLayout(
            num_samples=num_samples,
            global_batch_size=loader.batch_size,
            num_data_shards=num_data_shards,
            data_rank=data_rank,
            accumulate=accumulate,
            drop_last=loader.drop_last,
            fixed_pieces=fixed_pieces,
        )
        if loader.batch_size < num_data_shards:
            raise DataError(
                f"The loader's batch_size={loader.batch_size} is the global batch, and it is smaller than "
                f"the {num_data_shards} data-parallel ranks that share it.",
                "Each rank needs at least one sample of a full batch.",
                f"Set batch_size to {num_data_shards} or more, or launch fewer ranks.",
            )
        if self._is_stream and fixed_pieces:
            raise DataError(
                "A sharded IterableDataset under numerics='world_invariant'.",
                "Which samples a stream gives depends on the number of ranks.",
                "Use a map-style dataset, or other numerics.",
            )
        if self._is_stream and loader.batch_size % num_data_shards:
            raise DataError(
                f"A sharded IterableDataset with batch_size={loader.batch_size} over {num_data_shards} "
                "ranks.",
                "Streams advance together, so the ranks' shares of the global batch must be equal.",
                f"Set batch_size to a multiple of {num_data_shards}.",
            )
        self._source: MicrobatchSource = (
            StreamSource(loader, self.layout)
            if self._is_stream
            else MapSource(loader, self.layout, self._sampler)
        )

    @property
    def global_batch_size(self) -> int:
        """Samples of one optimizer step over all ranks: the loader's batch_size."""
        return self.layout.global_batch_size

    @property
    def per_rank_batch_size(self) -> int:
        """This rank's samples of a full global batch."""
        return self.layout.per_rank_batch_size

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch, the same on every rank."""
        return self.layout.num_batches

    @property
    def epoch(self) -> int:
        """The epoch that iterating gives next, or is giving now."""
        return self._sampler.epoch

    @property
    def sample(self) -> int:
        """Global samples of this epoch that were given already."""
        return self._sampler.position

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of another epoch; within the present one the position is kept."""
        self._sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position in global samples: equal on all ranks, and plain values only."""
        return {**self._sampler.state_dict(), "num_data_shards": self.layout.num_data_shards}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the last batch that was received when `state` was taken, with the state's seed."""
        if self._is_stream:
            check_same_stream(state, self.layout)
        self._sampler.load_state_dict(state)
        if next(self.layout.batches_from(self.sample), None) is None:
            self._sampler.set_epoch(self.epoch + 1)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[Any]]:
        epoch = self.epoch
        microbatches = self._source.microbatches(epoch, self.sample)
        for batch in self.layout.batches_from(self.sample):
            mine = [next(microbatches) for _ in self.layout.microbatches(batch)]
            self._sampler.position = batch.stop
            yield mine
        self._sampler.set_epoch(epoch + 1)
