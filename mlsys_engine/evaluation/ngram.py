"""Byte n-gram baselines: what a model has to beat before it is worth a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlsys_engine.errors import DataError

NUM_BYTES = 256
Bytes = NDArray[Any]


def ngram_baselines(train: Bytes, validation: Bytes, alpha: float = 0.1) -> dict[str, dict[str, float]]:
    """Fits uniform, unigram and bigram models on `train` and gives each one's bits per byte on `validation`.

    `train` is one row of bytes. `validation` is one row, or a matrix whose rows are separate windows: so the
    baselines can be measured on exactly the bytes that a model with those windows predicts, all but the first
    of each row. Counts are smoothed by adding `alpha` to each (Lidstone), so that an unseen pair costs bits
    but never infinitely many. Linear in the bytes: about a second for 30 MB.
    """
    if not alpha > 0:
        raise DataError(f"alpha={alpha}.", "Smoothing adds a positive count.", "Set alpha to, say, 0.1.")
    train_bytes, windows = _check(train, "train").reshape(-1), np.atleast_2d(_check(validation, "validation"))
    if train_bytes.size < 2 or windows.shape[1] < 2 or not windows.shape[0]:
        raise DataError(
            f"{train_bytes.size} bytes to fit and windows of shape {windows.shape} to measure.",
            "A byte is predicted from the one before it, so at least two are needed.",
            "Give more text.",
        )
    pair_counts = _pair_counts(train_bytes[:-1], train_bytes[1:]).astype(np.float64)
    measured = _pair_counts(windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1)).astype(np.float64)
    unigram = np.bincount(train_bytes, minlength=NUM_BYTES) + alpha
    bigram = pair_counts + alpha
    models = {
        "uniform": np.full((1, NUM_BYTES), 1.0 / NUM_BYTES),
        "unigram": (unigram / unigram.sum())[None, :],
        "bigram": bigram / bigram.sum(axis=1, keepdims=True),
    }
    return {
        name: {"bits_per_byte": float(-(measured * np.log2(probability)).sum() / measured.sum())}
        for name, probability in models.items()
    }


def _pair_counts(first: Bytes, second: Bytes) -> NDArray[np.int64]:
    """counts[a, b] = how often byte b follows byte a."""
    pairs = first.astype(np.uint16) * np.uint16(NUM_BYTES) + second
    return np.bincount(pairs, minlength=NUM_BYTES**2).reshape(NUM_BYTES, NUM_BYTES)


def _check(values: Bytes, name: str) -> Bytes:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim > 2:
        raise DataError(
            f"{name} has dtype {array.dtype} and shape {array.shape}.",
            "Bytes are integers in a row, or in rows.",
            "Use numpy.frombuffer(text, dtype=numpy.uint8).",
        )
    if array.dtype != np.uint8:
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < NUM_BYTES:
            raise DataError(
                f"{name} holds values from {array.min()} to {array.max()}.",
                "Bytes lie in 0 to 255.",
                "These baselines are for byte-level text; encode it as UTF-8.",
            )
        array = array.astype(np.uint8)
    return array
