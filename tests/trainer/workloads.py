"""Small trainings for the tests of this folder; everything at module level, so that forked ranks can import
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mlsys_engine.trainer import Trainer


class DropoutNet(nn.Module):
    """A regression with dropout, so that random numbers matter."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs)


def make_model(seed: int = 0, dropout: float = 0.3) -> DropoutNet:
    torch.manual_seed(seed)
    return DropoutNet(dropout)


def make_dataset(num_samples: int = 60) -> Dataset[Any]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(num_samples, 6, generator=generator)
    return TensorDataset(inputs, inputs.sum(dim=1, keepdim=True).sin())


def make_loader(num_samples: int = 60, batch_size: int = 8, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(make_dataset(num_samples), batch_size=batch_size, shuffle=shuffle)


def mean_squared_error(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(output, batch[1])


def make_trainer(
    run_dir: Path | str, *callbacks: Any, model: nn.Module | None = None, **settings: Any
) -> Trainer:
    """A Trainer of the regression with a tracker that keeps quiet unless asked for."""
    defaults: dict[str, Any] = {"loss": mean_squared_error, "trackers": (), "run_dir": run_dir}
    return Trainer(make_model() if model is None else model, callbacks=callbacks, **{**defaults, **settings})


class Losses:
    """Collects every step's loss and learning rate."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}
        self.lrs: list[float] = []

    def on_step_end(self, step: int, result: Any, lr: float) -> None:
        self.by_step[step] = result.loss.item()
        self.lrs.append(lr)

    @property
    def values(self) -> list[float]:
        return list(self.by_step.values())


class Journal:
    """Collects the names of all events and what came with some of them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.metrics: list[dict[str, float]] = []
        self.status = ""

    def on_fit_start(self, step: int) -> None:
        self.events.append(f"fit_start {step}")

    def on_epoch_start(self, step: int, epoch: int) -> None:
        self.events.append(f"epoch_start {epoch} at {step}")

    def on_epoch_end(self, step: int, epoch: int) -> None:
        self.events.append(f"epoch_end {epoch} at {step}")

    def on_evaluation_end(self, step: int, metrics: dict[str, float]) -> None:
        self.events.append(f"evaluation {step}")
        self.metrics.append(dict(metrics))

    def on_checkpoint_saved(self, step: int, path: Path) -> None:
        self.events.append(f"saved {path.name} at {step}")

    def on_fit_end(self, step: int, status: str) -> None:
        self.events.append(f"fit_end {step}")
        self.status = status
