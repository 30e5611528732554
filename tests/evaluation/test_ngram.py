"""The byte baselines against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlsys_engine.errors import DataError
from mlsys_engine.evaluation import ngram_baselines


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def bits(train: np.ndarray, validation: np.ndarray, alpha: float = 0.1) -> dict[str, float]:
    return {name: value["bits_per_byte"] for name, value in ngram_baselines(train, validation, alpha).items()}


def test_smoothed_counts_give_the_probabilities_worked_out_by_hand():
    found = bits(as_bytes("aab"), as_bytes("ab"), alpha=0.5)
    assert found["uniform"] == 8.0
    # One prediction, "b": counted once in 3 bytes, and once in the 2 pairs that begin with "a".
    assert found["unigram"] == pytest.approx(-math.log2(1.5 / (3 + 128)), rel=1e-12)
    assert found["bigram"] == pytest.approx(-math.log2(1.5 / (2 + 128)), rel=1e-12)


def test_text_that_a_bigram_knows_costs_almost_nothing():
    text = as_bytes("ab" * 50_000)
    found = bits(text, text)
    assert found["unigram"] == pytest.approx(1.0, abs=0.01)
    assert found["bigram"] < 0.01


def test_random_bytes_cannot_be_predicted():
    train, validation = np.random.default_rng(0).integers(0, 256, (2, 200_000), dtype=np.uint8)
    found = bits(train, validation)
    # No model beats 8 bits on average; the bigram pays for 65536 probabilities fitted to 200000 pairs.
    assert 7.99 < found["unigram"] < 8.01
    assert 8.0 < found["bigram"] < 8.5


def test_an_unseen_pair_costs_finitely_many_bits():
    assert math.isfinite(bits(as_bytes("aaaa"), as_bytes("zq"))["bigram"])


def test_windows_are_measured_without_the_pairs_across_them():
    train = as_bytes("abababxyxyxy")
    row = bits(train, as_bytes("abxy"))["bigram"]
    windows = bits(train, as_bytes("abxy").reshape(2, 2))["bigram"]
    assert windows < row  # the row also predicts x after b


@pytest.mark.parametrize(
    ("train", "validation", "alpha", "words"),
    [
        (as_bytes("a"), as_bytes("ab"), 0.1, "1 bytes to fit"),
        (as_bytes("ab"), as_bytes("a"), 0.1, r"shape \(1, 1\)"),
        (as_bytes("ab"), as_bytes("ab"), 0.0, "alpha=0.0"),
        (as_bytes("ab"), np.array([1, 256]), 0.1, "values from 1 to 256"),
        (np.array([0.5, 1.0]), as_bytes("ab"), 0.1, "float64"),
    ],
)
def test_what_is_not_text_is_refused(train, validation, alpha, words):
    with pytest.raises(DataError, match=words):
        ngram_baselines(train, validation, alpha)


def test_bytes_in_a_wider_dtype_are_bytes():
    text = as_bytes("some text of bytes")
    assert bits(text, text) == bits(text.astype(np.int64), text.astype(np.uint16))
