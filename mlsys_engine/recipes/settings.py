"""The settings that all recipes share, and what they mean to the Trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import nn

from mlsys_engine import optim, strategies
from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.tracking import check_trackers

_COUNTS = ("steps", "batch_size", "accumulate", "eval_every", "eval_samples", "save_every")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long and how to train; the defaults train the quickstart's model on two CPU cores."""

    steps: int = 700
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences in one optimizer step, over all ranks together."""
    accumulate: int = 1
    """Microbatches into which each rank cuts its share of a batch, to save memory."""
    learning_rate: float = 5e-3
    """Highest learning rate of AdamW, after the warm-up."""
    warmup_steps: int = 40
    """Steps in which the learning rate rises from zero."""
    final_lr_fraction: float = 0.05
    """Learning rate of the last step as a part of the highest; a cosine leads there."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW."""
    beta2: float = 0.95
    """Decay of AdamW's second moment in one step."""
    max_grad_norm: float | None = 1.0
    """Global 2-norm to which gradients are clipped; None leaves them alone."""
    eval_every: int = 350
    """Steps from one evaluation to the next; one more comes at the end."""
    eval_samples: int = 4096
    """Validation sequences, spread over the whole of the validation data."""
    save_every: int = 350
    """Steps from one checkpoint to the next; one more is written at the end."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    strategy: str = "data_parallel"
    """Name of the parallel strategy."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-pure", "fp16-pure"] = "fp32"
    """Arithmetic of forward and backward; pure ones store the parameters so, too."""
    activation: str | None = "full"
    """What blocks keep: full runs them again, selective cheap operations; or a budget: 0.5, 50%, 6GiB."""
    compile: bool = False
    """Compile the model with torch.compile."""
    numerics: Literal["fast", "reproducible", "world_invariant"] = "fast"
    """The promise about bits; fast still resumes exactly."""
    trackers: tuple[str, ...] = ("local",)
    """Names of the trackers that get the run's metrics."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise _refused(name, getattr(self, name), "a whole number of at least 1")
        for name in ("warmup_steps", "seed", "weight_decay"):
            if getattr(self, name) < 0:
                raise _refused(name, getattr(self, name), "0 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise _refused("learning_rate", self.learning_rate, "a positive number")
        if not 0 <= self.beta2 < 1:
            raise _refused("beta2", self.beta2, "from 0 to below 1")
        if not 0 <= self.final_lr_fraction <= 1:
            raise _refused("final_lr_fraction", self.final_lr_fraction, "from 0 to 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise _refused("max_grad_norm", self.max_grad_norm, "a positive number, or None")

    def check(self, num_ranks: int) -> None:
        """Refuses unknown names and batches that leave a rank without a sequence, before any rank starts."""
        strategies.from_name(self.strategy)
        strategies.check_activation(nn.Identity(), self.activation)
        check_trackers(self.trackers)
        if self.batch_size < num_ranks:
            raise DataError(
                f"--batch-size {self.batch_size} with {num_ranks} ranks.",
                "batch_size counts the sequences of one step over all ranks; each rank needs at least one.",
                f"Set --batch-size to {num_ranks} or more, or launch fewer ranks.",
            )

    def trainer_kwargs(self) -> dict[str, Any]:
        """What the Trainer is made with."""
        return {
            "optimizer": partial(
                optim.AdamW, lr=self.learning_rate, betas=(0.9, self.beta2), weight_decay=self.weight_decay
            ),
            "lr_schedule": self.lr_schedule(),
            "strategy": strategies.from_name(self.strategy),
            "precision": self.precision,
            "max_grad_norm": self.max_grad_norm,
            "accumulate": self.accumulate,
            "activation": self.activation,
            "compile": self.compile,
            "trackers": self.trackers,
            "seed": self.seed,
            "numerics": self.numerics,
        }

    def lr_schedule(self) -> optim.schedules.Cosine:
        """The factor of the learning rate, step by step. A training may end within its warm-up."""
        return optim.schedules.Cosine(
            total_steps=max(self.steps, self.warmup_steps),
            warmup_steps=self.warmup_steps,
            final=self.final_lr_fraction,
        )

    def fit_kwargs(self) -> dict[str, Any]:
        """What `fit` is called with besides the loaders."""
        return {"max_steps": self.steps, "eval_every": self.eval_every, "save_every": self.save_every}


def _refused(name: str, value: object, expected: str) -> ConfigError:
    option = "--" + name.replace("_", "-")
    return ConfigError(f"{option} {value}.", f"{name} is {expected}.", f"Change {option}.")
