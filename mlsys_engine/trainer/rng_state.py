"""The random number generators of this process: seeding, capturing and restoring them all at once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int, data_rank: int, step: int = 0) -> None:
    """Seeds python's, numpy's and torch's generators for one data rank: dropout differs between data ranks.

    `step` tells apart the continuations of one training, so that a resumed one does not repeat earlier masks.
    """
    digest = hashlib.sha256(f"mlsys_engine dropout {seed} {data_rank} {step}".encode()).digest()
    random.seed(int.from_bytes(digest[8:16], "big"))
    np.random.seed(int.from_bytes(digest[16:20], "big"))
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def capture() -> dict[str, Any]:
    """The state of every generator, as plain values and tensors (they load with `weights_only`)."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Puts every generator back where `capture` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the generators as they were before the block: evaluating more often must not change the
    training.
    """
    state = capture()
    try:
        yield
    finally:
        restore(state)
