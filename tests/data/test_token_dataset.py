"""Windows of tokens: every token but the first is predicted once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mlsys_engine.data import TokenDataset, write_token_file
from mlsys_engine.errors import DataError


@given(st.integers(2, 80), st.integers(1, 20))
def test_targets_of_all_windows_are_the_tokens_in_order(num_tokens, context_length):
    if num_tokens <= context_length:
        return
    dataset = TokenDataset(np.arange(num_tokens, dtype=np.uint16), context_length)
    targets = [token for window in dataset for token in window["labels"][1:].tolist()]
    num_windows = (num_tokens - 1) // context_length
    assert targets == list(range(1, num_windows * context_length + 1))
    assert len(dataset) == num_windows


def test_labels_equal_inputs_but_are_not_the_same_memory():
    window = TokenDataset(torch.arange(5), 4)[0]
    assert window["input_ids"].tolist() == window["labels"].tolist() == [0, 1, 2, 3, 4]
    assert window["input_ids"].dtype == torch.int64
    window["labels"][0] = -100
    assert window["input_ids"][0] == 0


def test_the_largest_token_of_uint32_is_not_negative(tmp_path):
    file = write_token_file(tmp_path / "tokens.bin", [0, 2**32 - 1], np.uint32)
    assert TokenDataset(file, 1)[0]["input_ids"].tolist() == [0, 2**32 - 1]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_mapped_file(tmp_path, context):
    dataset = TokenDataset(write_token_file(tmp_path / "tokens.bin", range(9)), 2)
    loader = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context=context)
    [batch] = list(loader)
    assert batch["input_ids"].tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_window_that_does_not_exist_is_an_index_error(index):
    with pytest.raises(IndexError):
        TokenDataset(np.arange(5), 2)[index]


@pytest.mark.parametrize(
    ("tokens", "context_length", "words"),
    [
        (np.arange(4), 4, "4 tokens with context_length=4"),
        (np.arange(4), 0, "context_length=0"),
        (np.zeros((2, 2), dtype=np.uint8), 1, "one row of integers"),
        (np.zeros(4), 1, "float64"),
    ],
)
def test_tokens_that_give_no_window_are_refused(tokens, context_length, words):
    with pytest.raises(DataError, match=words):
        TokenDataset(tokens, context_length)
