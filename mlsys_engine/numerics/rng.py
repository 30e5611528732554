"""Random numbers that depend on the seed and the share of the data, never on the process."""

from __future__ import annotations

import functools
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
    """Seeds all generators for one leaf of a step's canonical tree.

    So dropout depends on the step and on the piece of the global batch, not on the rank that computes it.
    """
    seed_generators(seed, "leaf", step, leaf)


def seed_generators(seed: int, *path: int | str) -> None:
    """Seeds python's, numpy's and torch's generators on all devices for one purpose."""
    own = derived_seed(seed, *path)
    if _has_accelerator():
        torch.manual_seed(own)
    else:  # for a device that may come yet, torch.manual_seed would keep every call and its traceback
        torch.default_generator.manual_seed(own)
    random.seed(derived_seed(seed, *path, "python"))
    np.random.seed(derived_seed(seed, *path, "numpy") % 2**32)


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
