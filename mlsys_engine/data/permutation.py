"""A pseudo-random permutation that can be asked for any position without building the whole of it.

An epoch's order must be known at any position (resume) and cost nothing for a dataset of 10^10 samples, so it
is a keyed bijection and not a shuffled array: a balanced Feistel network over the smallest even number of
bits that holds the dataset, with cycle walking for the rest of the domain (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). Integer arithmetic only: the order is the same on every machine and in every
version of torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 6  # four suffice in theory (Luby and Rackoff 1988); the tiny halves of tiny datasets want more
_MIN_HALF_BITS = 3
_MASK_64 = (1 << 64) - 1


def permute(positions: NDArray[np.int64], num_samples: int, key: int) -> NDArray[np.int64]:
    """The indices at `positions` of the permutation of range(num_samples) that `key` names.

    Every position must be in range(num_samples). The walk ends because the network permutes its domain: the
    cycle of a position inside the dataset returns to the dataset at the latest at that position itself.
    """
    half_bits = max(_MIN_HALF_BITS, ((num_samples - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(mix(key + number)) for number in range(_NUM_ROUNDS)]
    values = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    limit = np.uint64(num_samples)
    outside = np.flatnonzero(values >= limit)
    while outside.size:
        walked = _feistel(values[outside], half_bits, round_keys)
        values[outside] = walked
        outside = outside[walked >= limit]
    return values.astype(np.int64)


def mix(value: int) -> int:
    """64 well-mixed bits of an integer: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    return int(_mix_array(np.array([(value + 0x9E3779B97F4A7C15) & _MASK_64], dtype=np.uint64))[0])


def combine(*parts: int) -> int:
    """One 64-bit key that depends on every part and on their order."""
    key = 0
    for part in parts:
        key = mix(key ^ (part & _MASK_64))
    return key


def _feistel(values: NDArray[np.uint64], half_bits: int, round_keys: list[np.uint64]) -> NDArray[np.uint64]:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix_array(right ^ round_key) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
