"""gpt-bytes: a small byte-level GPT on text that every machine has, beside n-gram baselines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import tyro

from mlsys_engine.data import TokenDataset, stdlib_corpus
from mlsys_engine.errors import ConfigError
from mlsys_engine.evaluation import ngram_baselines
from mlsys_engine.models import GPTConfig
from mlsys_engine.recipes.base import RecipeRun
from mlsys_engine.recipes.language_model import make_gpt, make_loaders
from mlsys_engine.recipes.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class GPTBytes:
    """A byte-level GPT on the source text of Python's standard library."""

    training: Annotated[TrainingSettings, tyro.conf.arg(name="")] = field(default_factory=TrainingSettings)
    """How long and how to train."""
    model: GPTConfig = field(default_factory=GPTConfig)
    """Size of the model."""
    corpus_bytes: int | None = None
    """Bytes of text to use, a sample over all files; None takes everything."""

    def __post_init__(self) -> None:
        if self.model.vocab_size < 256:
            raise ConfigError(
                f"--model.vocab-size {self.model.vocab_size}.",
                "The tokens of this recipe are bytes, so the vocabulary holds at least 256.",
                "Leave --model.vocab-size at 256.",
            )

    def check(self, num_ranks: int) -> None:
        """Refuses what cannot work on `num_ranks` ranks, before any of them starts."""
        self.training.check(num_ranks)

    def build(self, *, with_baselines: bool = True) -> RecipeRun:
        """Reads the corpus (half a second), makes the model and, when asked, fits the baselines."""
        corpus = stdlib_corpus(self.corpus_bytes)
        context = self.model.context_length - 1  # a window holds one byte more than it predicts
        train, validation = TokenDataset(corpus.train, context), TokenDataset(corpus.validation, context)
        train_loader, eval_loader, chosen = make_loaders(train, validation, self.training)
        baselines: dict[str, dict[str, float]] = {}
        if with_baselines:  # on exactly the bytes that the model is evaluated on
            windows = np.stack([corpus.validation[i * context : (i + 1) * context + 1] for i in chosen])
            baselines = ngram_baselines(corpus.train, windows)
        return RecipeRun(
            model=make_gpt(self.model, self.training.seed),
            train_loader=train_loader,
            eval_loader=eval_loader,
            trainer_kwargs=self.training.trainer_kwargs(),
            fit_kwargs=self.training.fit_kwargs(),
            baselines=baselines,
            data_manifest={
                "fingerprint": corpus.fingerprint,
                "description": corpus.description,
                "unit": "byte",
                "train_bytes": len(corpus.train),
                "validation_bytes": len(corpus.validation),
                "validation_windows": len(chosen),
            },
        )
