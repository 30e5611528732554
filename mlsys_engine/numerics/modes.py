"""What `numerics=` promises, and how it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def numerics_mode(mode: str) -> Iterator[None]:
    """Keeps the promise of `mode` for the work inside.

    "fast" changes nothing. "reproducible" makes torch use deterministic algorithms only; an operation that
    has none raises torch's own error, which names it. "world_invariant" also runs torch on one thread, since
    how an operation is split over threads may change the order of its sums, and ranks have fewer threads the
    more of them there are. The collectives and the optimizers of the engine sum in a fixed order in every
    mode.
    """
    if mode == "fast":
        yield
        return
    before, num_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    if mode == "world_invariant":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if mode == "world_invariant":
            torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
