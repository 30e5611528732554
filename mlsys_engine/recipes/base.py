"""What a recipe is: frozen settings, a check that needs no ranks, and a way to build the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.utils.data import DataLoader

from mlsys_engine.recipes.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """A training that is ready to start: what goes to `Trainer(...)` and to its `fit(...)`."""

    model: nn.Module
    train_loader: DataLoader[Any]
    eval_loader: DataLoader[Any]
    trainer_kwargs: Mapping[str, Any]
    fit_kwargs: Mapping[str, Any]
    baselines: Mapping[str, Mapping[str, float]]
    """What simple models reach on the same validation data; empty when none were fitted."""
    data_manifest: Mapping[str, Any]
    """What the data is: `fingerprint`, `description`, `unit`; goes into the run's manifest."""


class Recipe(Protocol):
    """One training by name. A new one is one file and one line in `registry.RECIPES`."""

    @property
    def training(self) -> TrainingSettings: ...

    def check(self, num_ranks: int) -> None:
        """Refuses what cannot work on `num_ranks` ranks, quickly and before any of them starts."""

    def build(self, *, with_baselines: bool = True) -> RecipeRun:
        """Reads the data and makes the model, the same on every rank. Only rank 0 needs the baselines."""
