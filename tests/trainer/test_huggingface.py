"""A Hugging Face GPT2LMHeadModel trains unchanged, with the losses of DDP's arithmetic and torch's AdamW."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mlsys_engine.optim import AdamW
from tests.trainer.workloads import Losses, make_trainer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BATCH, TOKENS, VOCABULARY = 6, 12, 40


class Sentences(Dataset[Any]):
    """Random tokens; with `ragged`, labels that count in another number for every sample."""

    def __init__(self, ragged: bool) -> None:
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(VOCABULARY, (60, TOKENS), generator=generator)
        self.ragged = ragged

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.tokens[index].clone()
        if self.ragged:
            labels[2 + index * 5 % (TOKENS - 2) :] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


def _model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _reference(ragged: bool, num_steps: int) -> list[float]:
    """One process over the whole batch, which is also what DDP computes when token counts are equal."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = list(DataLoader(Sentences(ragged), batch_size=BATCH))
    losses = []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _train(rank: int, world_size: int, run_dir: str, ragged: bool, num_steps: int) -> list[float]:
    losses = Losses()
    trainer = make_trainer(run_dir, losses, model=_model(), loss=None, optimizer=partial(AdamW, lr=1e-3))
    trainer.fit(DataLoader(Sentences(ragged), batch_size=BATCH), max_steps=num_steps)
    return losses.values


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_are_those_of_one_process_over_the_whole_batch(
    tmp_path: Path, run_ranks: Any, world_size: int, ragged: bool
) -> None:
    num_steps = 50 if world_size > 1 else 10
    for losses in run_ranks(_train, world_size, str(tmp_path), ragged, num_steps):
        # The bound of the acceptance criterion; fp32 sums in another order over 50 steps.
        torch.testing.assert_close(losses, _reference(ragged, num_steps), rtol=1e-5, atol=0.0)
