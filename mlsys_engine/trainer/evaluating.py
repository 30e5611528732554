"""The loss over a whole loader: an exact global mean, however unequal the shards."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import DataLoader

from mlsys_engine.data import evaluation_shares
from mlsys_engine.errors import DataError
from mlsys_engine.plan.runner import Runner
from mlsys_engine.trainer.rng_state import undisturbed


def evaluate(runner: Runner, loader: DataLoader[Any], *, is_bytes: bool) -> dict[str, float]:
    """`val_loss` over `loader`, and `val_bits_per_byte` when a token is a byte. Every rank calls it.

    Loss sums and counts of all shards are added up and divided once at the end, so no sample is dropped,
    doubled or weighted by its shard; the result is read from the device once. Raises DataError when nothing
    was counted.
    """
    loss_sum: torch.Tensor | None = None
    count: torch.Tensor | None = None
    with undisturbed():
        for share in evaluation_shares(loader, runner.data_rank, runner.num_data_shards):
            result = runner.evaluate(share)
            loss_sum = result.loss_sum if loss_sum is None else loss_sum + result.loss_sum
            count = result.count if count is None else count + result.count
    if loss_sum is None or count is None or int(count) == 0:
        raise DataError(
            "The evaluation loader gave no labels that count.",
            "An evaluation is a mean over at least one label.",
            "Give an eval_loader with samples (drop_last=False for a small dataset), or leave it out.",
        )
    val_loss = float(loss_sum) / float(count)
    metrics = {"val_loss": val_loss}
    if is_bytes:
        metrics["val_bits_per_byte"] = val_loss / math.log(2.0)
    return metrics
