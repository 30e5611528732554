"""What the recipes for language models share: loaders over windows of tokens, and the seeded model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from mlsys_engine.data import TokenDataset
from mlsys_engine.models import GPT, GPTConfig
from mlsys_engine.recipes.settings import TrainingSettings


def make_loaders(
    train: TokenDataset, validation: TokenDataset, training: TrainingSettings
) -> tuple[DataLoader[Any], DataLoader[Any], list[int]]:
    """Shuffled training batches, validation batches in order, and the validation windows that were chosen.

    Both loaders yield global batches. The validation windows are spread evenly, so that a few hundred already
    speak for the whole.
    """
    count = min(training.eval_samples, len(validation))
    chosen = [int(index) for index in np.linspace(0, len(validation) - 1, count).round()]
    # The order of the shuffle comes from the Trainer's seed.
    train_loader = DataLoader(train, batch_size=training.batch_size, shuffle=True, drop_last=True)
    # Evaluation keeps nothing for a backward, so its batches may be larger.
    eval_loader = DataLoader(Subset(validation, chosen), batch_size=4 * training.batch_size)
    return train_loader, eval_loader, chosen


def make_gpt(config: GPTConfig, seed: int) -> GPT:
    """The model with the initial weights of `seed`; the process's own random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config)
