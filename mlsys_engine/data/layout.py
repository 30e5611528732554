"""Which samples of an epoch each rank sees in which microbatch: a value, with nothing to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlsys_engine.errors import DataError


def share(span: range, index: int, num_shares: int) -> range:
    """The `index`-th of `num_shares` contiguous pieces of a span; larger ones come first.

    Sizes differ by at most one, and pieces may be empty. In order they make up the span.
    """
    size, num_larger = divmod(len(span), num_shares)
    start = span.start + index * size + min(index, num_larger)
    return range(start, start + size + (index < num_larger))


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """How an epoch is cut: into global batches, each into one share a data shard, each into microbatches."""

    num_samples: int  # of the whole epoch, over all data shards
    global_batch_size: int  # samples of one optimizer step over all data shards
    num_data_shards: int  # ranks, or groups of ranks, that feed different samples
    data_rank: int  # which of them this rank feeds
    accumulate: int = 1  # microbatches that a rank's share of one global batch is cut into
    drop_last: bool = False  # leave out a last batch that is not full
    # Cut a global batch into num_data_shards * accumulate pieces at once, and give each data shard its
    # `accumulate` consecutive ones: the pieces are then the same however many data shards there are.
    fixed_pieces: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.data_rank < self.num_data_shards:
            raise DataError(
                f"data_rank={self.data_rank} with num_data_shards={self.num_data_shards}.",
                "A data rank lies in range(num_data_shards).",
                "Pass the runner's own data_rank and num_data_shards.",
            )
        largest_share = -(-self.global_batch_size // self.num_data_shards)
        if not 1 <= self.accumulate <= largest_share:
            raise DataError(
                f"accumulate={self.accumulate} with at most {largest_share} samples a rank in a step "
                f"(global batch {self.global_batch_size} over {self.num_data_shards} ranks).",
                "accumulate cuts a rank's share of the global batch into that many microbatches.",
                f"Set accumulate between 1 and {largest_share}, or raise the loader's batch_size.",
            )
        if self.num_batches == 0:
            raise DataError(
                f"drop_last=True, and {self.num_samples} samples do not fill one batch of "
                f"{self.global_batch_size}.",
                "At least one batch an epoch is needed.",
                "Set drop_last=False, or a smaller batch_size.",
            )

    @property
    def num_batches(self) -> int:
        """Global batches in a whole epoch: the same number on every rank."""
        full, rest = divmod(self.num_samples, self.global_batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def per_rank_batch_size(self) -> int:
        """This rank's samples in a full batch."""
        return len(self.rank_share(range(self.global_batch_size)))

    def batches_from(self, sample: int) -> Iterator[range]:
        """The global batches of an epoch that is continued after `sample` samples."""
        while sample < self.num_samples:
            stop = min(sample + self.global_batch_size, self.num_samples)
            if self.drop_last and stop - sample < self.global_batch_size:
                return
            yield range(sample, stop)
            sample = stop

    def rank_share(self, batch: range) -> range:
        """This rank's contiguous part of a global batch; empty when a last batch is too small."""
        if self.fixed_pieces:
            pieces = self._pieces(batch)
            return range(pieces[0].start, pieces[-1].stop)
        return share(batch, self.data_rank, self.num_data_shards)

    def microbatches(self, batch: range) -> list[range]:
        """This rank's share cut for accumulation, without empty pieces: possibly no microbatch at all."""
        return [piece for piece in self._pieces(batch) if len(piece)]

    def _pieces(self, batch: range) -> list[range]:
        if self.fixed_pieces:
            first, total = self.data_rank * self.accumulate, self.num_data_shards * self.accumulate
            return [share(batch, first + index, total) for index in range(self.accumulate)]
        mine = self.rank_share(batch)
        return [share(mine, index, self.accumulate) for index in range(self.accumulate)]
