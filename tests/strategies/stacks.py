"""A small language model with tied weights, and one process that trains it on a pipeline's microbatches."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from mlsys_engine.pipeline.runtime.cut import cut
from tests.data_parallel.models import alone

WORDS, WIDTH = 23, 16


class Block(nn.Module):
    """A residual block with a norm and, if asked for, a running statistic and dropout."""

    def __init__(self, width: int, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if batch_norm else nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x.flatten(0, 1)).view_as(x)
        return x + self.dropout(self.down(functional.gelu(self.up(normed))))


class Stack(nn.Module):
    """Words to logits over the words; the output layer's weight is the embedding's."""

    def __init__(
        self, blocks: int = 4, tied: bool = True, dropout: float = 0.0, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, dropout, batch_norm) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def stack(seed: int = 0, **options) -> Stack:
    torch.manual_seed(seed)
    return Stack(**options)


def words(rows: int = 6, seed: int = 0, length: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and the ones to be told from them."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, WORDS, (rows, length + 1), generator=generator)
    return found[:, :-1], found[:, 1:]


def cross_entropy(logits, batch):
    return functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum"), batch[
        1
    ].numel()


def trained_alone(model, batches, pieces, optimizer, **options):
    """A runner of one process after a step for each of `batches`, cut as a pipeline does, and its losses."""
    runner = alone(model, optimizer=optimizer, loss=cross_entropy, **options)
    return runner, [runner.step(cut(batch, pieces)).loss for batch in batches]
