"""The random numbers of a plan's step, drawn again in one process: so dropout is compared, not left out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlsys_engine.numerics import derived_seed, seed_leaf
from mlsys_engine.pipeline.runtime.cut import cut
from mlsys_engine.pipeline.runtime.random_state import seed_microbatch
from mlsys_engine.plan import Plan
from mlsys_engine.strategies.stage_share import MICROBATCHES

SeedShard = Callable[[int], None]  # sets all generators as the ranks of a data shard have them


def seed_shard(seed: int, shard: int) -> None:
    """Seeds torch's, python's and numpy's generators for one data shard."""
    torch.manual_seed(derived_seed(seed, "data_rank", shard))
    random.seed(derived_seed(seed, "data_rank", shard, "python"))
    np.random.seed(derived_seed(seed, "data_rank", shard, "numpy") % 2**32)


@dataclass(frozen=True)
class Generators:
    """The states of this process's generators, which can be sent to another rank and be put back."""

    torch_state: torch.Tensor
    cuda_state: torch.Tensor | None
    python_state: Any
    numpy_state: Any

    @classmethod
    def now(cls, device: torch.device) -> Generators:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.torch_state)
        if self.cuda_state is not None:
            torch.cuda.set_rng_state(self.cuda_state, device)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)


def microbatches(plan: Plan, shard: int, batches: Sequence[Any], step: int) -> Iterator[Any]:
    """What the plan's ranks compute one by one from the `batches` of a data shard, each with its seed set.

    A pipeline cuts every batch, and gives each piece its own seed, from one that it draws first. The leaves
    of a world-invariant step are seeded by `step` and their place in the global batch. Anything else goes on
    with the shard's generators.
    """
    if plan.axis("pipeline") > 1:
        pieces = int(dict(plan.algorithms)[MICROBATCHES])
        cuts = (
            batches
            if len(batches) > plan.accumulate
            else [part for one in batches for part in cut(one, pieces)]
        )
        base = int(torch.randint(2**62, ()))
        for number, microbatch in enumerate(cuts):
            seed_microbatch(base, number)
            yield microbatch
        return
    for number, batch in enumerate(batches):
        if plan.numerics == "world_invariant":
            assert plan.seed is not None  # the plan refuses to be made without
            seed_leaf(plan.seed, step, shard * plan.accumulate + number)
        yield batch
