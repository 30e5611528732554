"""Random numbers of a microbatch: those of one process that seeds every microbatch by itself.

A microbatch's generators are seeded alike at its start on every stage. Their state then travels with what
crosses into the next stage (5 kB on a CPU), so that it goes on where this one stopped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mlsys_engine.numerics import seed_generators


def seed_microbatch(base: int, microbatch: int) -> None:
    """Seeds torch's, python's and numpy's generators for one microbatch of a step whose seed is `base`."""
    seed_generators(base, "microbatch", microbatch)


def generator_state(device: torch.device) -> torch.Tensor:
    """The state of torch's generators for the CPU and `device`, as bytes."""
    own = torch.get_rng_state()
    return own if device.type == "cpu" else torch.cat([own, torch.cuda.get_rng_state(device)])


def set_generator_state(state: torch.Tensor, device: torch.device) -> None:
    """Puts such a state back."""
    state = state.clone()  # torch reads from the beginning of the storage, wherever the tensor begins
    if device.type == "cpu":
        torch.set_rng_state(state)
        return
    num_bytes = torch.get_rng_state().numel()
    torch.set_rng_state(state[:num_bytes].clone())
    torch.cuda.set_rng_state(state[num_bytes:].clone(), device)


@contextmanager
def restored(device: torch.device) -> Iterator[None]:
    """Afterwards all generators are as they were, whatever the microbatches drew."""
    own, python, numpy = generator_state(device), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        set_generator_state(own, device)
        random.setstate(python)
        np.random.set_state(numpy)
