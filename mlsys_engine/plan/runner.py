"""What `apply` builds: the interface between every parallel strategy and the trainer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step. Tensors are 0-d, on the device; reading them (`.item()`) is what synchronises."""

    loss: torch.Tensor  # float64, mean over the global batch, the same on every rank
    grad_norm: torch.Tensor  # float64, global 2-norm of the mean gradient before clipping
    skipped: torch.Tensor  # bool, true when all ranks agreed to skip a step with a non-finite gradient
    num_tokens: torch.Tensor  # int64, the global count that divided the loss
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds on this rank, by phase
    measured: Mapping[str, torch.Tensor] = field(default_factory=dict)  # more to log: the loss scale, ...


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One evaluation batch, summed over data shards; divide at the very end, so unequal shards stay exact."""

    loss_sum: torch.Tensor  # float64, 0-d
    count: torch.Tensor  # int64, 0-d


@runtime_checkable
class Runner(Protocol):
    """A model that is laid out and ready to train. The trainer knows nothing else about parallelism."""

    @property
    def data_rank(self) -> int:
        """Which share of the global batch this rank feeds, 0 <= data_rank < num_data_shards."""

    @property
    def num_data_shards(self) -> int: ...

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, batches: Sequence[Any]) -> StepResult:
        """Forward, backward, reduction and update over this rank's microbatches (possibly none)."""

    def evaluate(self, batch: Any | None) -> EvalResult:
        """The loss of this rank's share (None: it has none), summed over all ranks; every rank calls it."""

    def predict(self, batch: Any) -> Any:
        """The model's output for this rank's own batch, in eval mode and without gradients."""

    def state_dict(self, full: bool = False) -> dict[str, Any]:
        """`{"model": {fqn: tensor}, "optimizer": {"state": {fqn: {name: value}}, "param_groups": []}}`.

        May hold "reduction" besides, which is this rank's alone, and "accumulation", "loss_scaler" and
        "noise_scale", the same on every rank.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    @property
    def elsewhere(self) -> Collection[str]:
        """Names of parameters and buffers of which this rank has nothing; a checkpoint skips them."""

    @property
    def holds_parts(self) -> bool:
        """Whether parameters here are parts of the model's: checkpoints then hold the full state."""

    def joined(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A tensor shaped like the parameter `name` is here, a gradient say, as one of the whole's shape.

        Ranks that hold parts of a parameter call it together.
        """

    def place_state(self, name: str, key: str) -> Any | None:
        """Where a checkpoint's piece `key` of the optimizer state of `name` goes; None: to a new tensor."""

    def close(self) -> None:
        """Gives the model back as an ordinary module with its weights; the runner is of no use afterwards."""
