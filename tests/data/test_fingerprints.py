"""Fingerprints: equal for equal content, different for different content, honest about what they hashed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from mlsys_engine.data import TokenDataset, fingerprint, stdlib_corpus, write_token_file
from tests.data.datasets import Numbers, Stream

TOKENS = np.arange(100, dtype=np.uint16)


def changed(array):
    copy = array.copy()
    copy[-1] += 1
    return copy


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TOKENS, changed(TOKENS)),
        (TOKENS, TOKENS.astype(np.uint32)),
        (TOKENS, TOKENS.reshape(10, 10)),
        (TokenDataset(TOKENS, 4), TokenDataset(changed(TOKENS), 4)),
        (TokenDataset(TOKENS, 4), TokenDataset(TOKENS, 5)),
        (TensorDataset(torch.arange(4)), TensorDataset(torch.arange(5))),
        (Subset(TokenDataset(TOKENS, 4), [0]), Subset(TokenDataset(TOKENS, 4), [1])),
        (ConcatDataset([TokenDataset(TOKENS, 4)]), ConcatDataset([TokenDataset(TOKENS, 4)] * 2)),
    ],
)
def test_known_kinds_are_named_by_their_content(one, other):
    assert fingerprint(one).startswith("sha256:")
    assert fingerprint(one) != fingerprint(other)


def test_equal_content_has_equal_names_wherever_it_lies():
    assert fingerprint(TokenDataset(TOKENS, 4)) == fingerprint(TokenDataset(TOKENS.copy(), 4))
    assert fingerprint(torch.ones(4, dtype=torch.bfloat16)) == fingerprint(
        torch.ones(8, dtype=torch.bfloat16)[::2]
    )


def test_a_token_file_is_named_by_its_header(tmp_path):
    file = write_token_file(tmp_path / "tokens.bin", TOKENS)
    assert fingerprint(file) == f"sha256:{file.sha256}"
    assert fingerprint(TokenDataset(file, 4)).startswith("sha256:")


def test_a_corpus_keeps_its_own():
    corpus = stdlib_corpus(200_000)
    assert fingerprint(corpus) == f"sha256:{corpus.fingerprint}"


@pytest.mark.parametrize("dataset", [Numbers(3), Stream(), Subset(Numbers(3), [0]), object()])
def test_anything_else_is_only_described(dataset):
    assert fingerprint(dataset).startswith("description-sha256:")


def test_descriptions_hold_the_length_and_the_datasets_own_fingerprint():
    plain, longer, named = Numbers(3), Numbers(4), Numbers(3)
    named._fingerprint = "abc"
    assert len({fingerprint(dataset) for dataset in (plain, longer, named)}) == 3
