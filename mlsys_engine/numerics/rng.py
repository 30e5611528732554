"""Random numbers that depend on the seed and the share of the data, never on the process."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derived_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one purpose: equal for equal arguments, unrelated for others (SHA-256)."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_data_rank(seed: int, data_rank: int) -> None:
    """Seeds torch's generators on all devices, so that dropout differs between shares of the batch.

    Called by apply when the plan has a seed, after the model's weights agree on all ranks.
    """
    torch.manual_seed(derived_seed(seed, "data_rank", data_rank))


def seed_leaf(seed: int, step: int, leaf: int) -> None:
    """Seeds python's, numpy's and torch's generators for one leaf of a step's canonical tree.

    So dropout depends on the step and on the piece of the global batch, not on the rank that computes it.
    """
    torch.manual_seed(derived_seed(seed, "leaf", step, leaf))
    random.seed(derived_seed(seed, "leaf", step, leaf, "python"))
    np.random.seed(derived_seed(seed, "leaf", step, leaf, "numpy") % 2**32)
