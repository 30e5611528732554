"""gpt-file: a GPT on a file of tokens that the user has prepared."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mlsys_engine.data import TokenDataset, TokenFile
from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.models import GPTConfig
from mlsys_engine.recipes.base import RecipeRun
from mlsys_engine.recipes.language_model import make_gpt, make_loaders
from mlsys_engine.recipes.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class GPTFile:
    """A GPT on a token file written by mlsys_engine.data.write_token_file."""

    tokens: Path
    """The token file to train on."""
    training: Annotated[TrainingSettings, tyro.conf.arg(name="")] = field(default_factory=TrainingSettings)
    """How long and how to train."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """Size of the model; vocab_size must exceed the largest token."""
    validation: Path | None = None
    """The token file to validate on; None holds out the end of the training file."""
    validation_share: float = 0.05
    """Part of the training file that is held out when there is no validation file."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ConfigError(
                f"--validation-share {self.validation_share}.",
                "It is a part of the file, between 0 and 1.",
                "Leave it at 0.05, or give a --validation file.",
            )

    def check(self, num_ranks: int) -> None:
        """Refuses what cannot work on `num_ranks` ranks, and files that are missing or of another kind."""
        self.training.check(num_ranks)
        for path in (self.tokens, self.validation):
            if path is not None:
                TokenFile(path)

    def build(self, *, with_baselines: bool = True) -> RecipeRun:
        """Maps the files and makes the model. It has no baselines: n-grams of tokens have no common unit."""
        train_tokens, validation_tokens, fingerprint = self._split()
        for tokens in (train_tokens, validation_tokens):
            self._check_vocabulary(tokens)
        context = self.model.context_length - 1  # a window holds one token more than it predicts
        train, validation = TokenDataset(train_tokens, context), TokenDataset(validation_tokens, context)
        train_loader, eval_loader, chosen = make_loaders(train, validation, self.training)
        return RecipeRun(
            model=make_gpt(self.model, self.training.seed),
            train_loader=train_loader,
            eval_loader=eval_loader,
            trainer_kwargs=self.training.trainer_kwargs(),
            fit_kwargs=self.training.fit_kwargs(),
            baselines={},
            data_manifest={
                "fingerprint": fingerprint,
                "description": f"token file {self.tokens}",
                "unit": "token",
                "train_tokens": len(train_tokens),
                "validation_tokens": len(validation_tokens),
                "validation_windows": len(chosen),
            },
        )

    def _split(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]:
        file = TokenFile(self.tokens)
        if self.validation is not None:
            held_out = TokenFile(self.validation)
            return file.tokens, held_out.tokens, f"{file.sha256}+{held_out.sha256}"
        border = len(file) - max(1, round(len(file) * self.validation_share))
        return file.tokens[:border], file.tokens[border:], file.sha256

    def _check_vocabulary(self, tokens: np.ndarray[Any, Any]) -> None:
        largest = int(tokens.max()) if len(tokens) else 0
        if largest >= self.model.vocab_size:
            raise DataError(
                f"{self.tokens} holds the token {largest}; --model.vocab-size is {self.model.vocab_size}.",
                "Tokens count from 0 to below the size of the vocabulary.",
                f"Set --model.vocab-size to {largest + 1} or more.",
            )
