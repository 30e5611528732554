"""Windows of a long row of tokens, for language models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mlsys_engine.data.token_file import TokenFile
from mlsys_engine.errors import DataError


class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Cuts tokens into windows that predict `context_length` tokens each.

    Item i is `{"input_ids": int64[T + 1], "labels": int64[T + 1]}` with T = context_length, labels equal to
    input_ids: the model shifts inside (the convention of Hugging Face). Windows overlap by one token, so that
    every token but the very first is predicted exactly once; fewer than T tokens at the end are left out.

    `tokens` is a TokenFile or a one-dimensional integer numpy array or tensor; nothing is copied.
    """

    def __init__(self, tokens: TokenFile | np.ndarray[Any, Any] | torch.Tensor, context_length: int) -> None:
        self.source = tokens
        self.context_length = context_length
        self._tokens = tokens.numpy() if isinstance(tokens, torch.Tensor) else tokens
        if context_length < 1:
            raise DataError(
                f"context_length={context_length}.",
                "A window predicts at least one token.",
                "Set context_length to 1 or more.",
            )
        if isinstance(self._tokens, np.ndarray) and not (
            self._tokens.ndim == 1 and np.issubdtype(self._tokens.dtype, np.integer)
        ):
            raise DataError(
                f"Tokens of shape {self._tokens.shape} and dtype {self._tokens.dtype}.",
                "A TokenDataset cuts one row of integers.",
                "Flatten the array; for text, encode it to bytes or with a tokenizer first.",
            )
        if len(self._tokens) <= context_length:
            raise DataError(
                f"{len(self._tokens)} tokens with context_length={context_length}.",
                "One window takes context_length + 1 tokens.",
                "Give more tokens, or a shorter context_length.",
            )

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self.context_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.context_length
        window = np.asarray(self._tokens[start : start + self.context_length + 1]).astype(np.int64)
        input_ids = torch.from_numpy(window)
        return {"input_ids": input_ids, "labels": input_ids.clone()}
