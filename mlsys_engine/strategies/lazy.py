"""A Runner that plans and builds itself when it first knows what a batch looks like."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.comm.launch import World
from mlsys_engine.plan import EvalResult, Plan, Runner, StepResult


class LazyRunner:
    """What `wrap` returns without a sample. Every rank calls the same methods in the same order.

    Rank 0's plan is everybody's: ranks may hold different microbatches at the first step, or none.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        make_plan: Callable[..., Plan],
        build: Callable[[Plan], Runner],
        world: World,
    ) -> None:
        self._model, self._make_plan, self._build, self._world = model, make_plan, build, world
        self._runner: Runner | None = None

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def data_rank(self) -> int:
        return self.built().data_rank

    @property
    def num_data_shards(self) -> int:
        return self.built().num_data_shards

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.built().optimizer

    def step(self, batches: Sequence[Any]) -> StepResult:
        """Builds at the first call, from the first microbatch, then steps."""
        has_sample = isinstance(batches, list | tuple) and len(batches) > 0
        return self.built(batches[0] if has_sample else None).step(batches)

    def evaluate(self, batch: Any | None) -> EvalResult:
        return self.built(batch).evaluate(batch)

    def predict(self, batch: Any) -> Any:
        return self.built(batch).predict(batch)

    def state_dict(self, full: bool = False) -> dict[str, Any]:
        return self.built().state_dict(full)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.built().load_state_dict(state)

    @property
    def elsewhere(self) -> Collection[str]:
        return self.built().elsewhere

    @property
    def holds_parts(self) -> bool:
        return self.built().holds_parts

    def joined(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return self.built().joined(name, part)

    def place_state(self, name: str, key: str) -> Any | None:
        return self.built().place_state(name, key)

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def built(self, sample: Any = None) -> Runner:
        """The runner itself, built now if it was not; a collective call the first time."""
        if self._runner is None:
            texts = [self._make_plan(sample).to_json() if self._world.rank == 0 else None]
            if self._world.world_size > 1:
                dist.broadcast_object_list(texts, src=0)
            assert texts[0] is not None
            self._runner = self._build(Plan.from_json(texts[0]))
        return self._runner
