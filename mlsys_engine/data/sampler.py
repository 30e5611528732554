"""A sampler indexed by sample: what stands at a position of an epoch depends only on (seed, epoch,
position)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from mlsys_engine.data.permutation import combine, permute
from mlsys_engine.errors import DataError

_BLOCK = 8192  # positions permuted at once; the order does not depend on it


class SampleSampler(Sampler[int]):
    """Gives every index of a dataset once an epoch, in an order that any position can be asked for.

    It never looks at the number of ranks, workers or the batch size, so a run continues with the same samples
    in the same order whatever they become. Memory is one block of indices, whatever the dataset's size.

    Used alone it is a resumable torch sampler: iterating starts at `position` (0 in a new epoch) and the next
    epoch begins after the last sample.
    """

    def __init__(self, num_samples: int, *, shuffle: bool, seed: int = 0) -> None:
        if num_samples < 1:
            raise DataError(
                f"The dataset has {num_samples} samples.",
                "At least one is needed.",
                "Check the path or the filter that made the dataset.",
            )
        self.num_samples, self.shuffle, self.seed = num_samples, shuffle, seed
        self.epoch, self.position = 0, 0
        self._block: tuple[tuple[int, int, int], NDArray[np.int64]] | None = None

    def indices(self, epoch: int, positions: range) -> list[int]:
        """The dataset indices at consecutive positions of an epoch."""
        if not self.shuffle:
            return list(positions)
        result: list[int] = []
        position = positions.start
        while position < positions.stop:
            first = position - position % _BLOCK
            stop = min(positions.stop, first + _BLOCK)
            result.extend(self._permuted(epoch, first)[position - first : stop - first].tolist())
            position = stop
        return result

    def sample_seeds(self, epoch: int, positions: range) -> list[int]:
        """A seed for each sample's own random numbers, a function of (seed, epoch, position) alone."""
        return [combine(self.seed, epoch, position, 1) for position in positions]

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of another epoch; does nothing within the present one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, counted in samples."""
        return {
            "epoch": self.epoch,
            "sample": self.position,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_samples": self.num_samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken; the seed of the state replaces this sampler's."""
        for name, present in (("num_samples", self.num_samples), ("shuffle", self.shuffle)):
            if state[name] != present:
                raise DataError(
                    f"The saved run had {name}={state[name]}, this loader has {name}={present}.",
                    "A run continues on the data and in the order that it was started with.",
                    "Give the same dataset and shuffle setting, or start a new run.",
                )
        self.epoch, self.position, self.seed = int(state["epoch"]), int(state["sample"]), int(state["seed"])

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        while self.position < self.num_samples:
            index = self.indices(epoch, range(self.position, self.position + 1))[0]
            self.position += 1
            yield index
        self.epoch, self.position = epoch + 1, 0

    def __len__(self) -> int:
        return self.num_samples

    def _permuted(self, epoch: int, first: int) -> NDArray[np.int64]:
        name = (self.seed, epoch, first)
        if self._block is None or self._block[0] != name:
            positions = np.arange(first, min(first + _BLOCK, self.num_samples), dtype=np.int64)
            self._block = (name, permute(positions, self.num_samples, combine(self.seed, epoch)))
        return self._block[1]
