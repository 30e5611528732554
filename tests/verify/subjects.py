"""Small models that the tests of this folder share; at module level, so that forked ranks can import them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import mlsys_engine as mls
from mlsys_engine.plan import Plan
from mlsys_engine.verify import Verdict, verify

# A bucket for every few parameters.
_BUCKETED = mls.DataParallel(bucket_mib=1e-4)


class Net(nn.Module):
    """Dropout, running statistics, a frozen bias, a layer that is never used, and float32 by hand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(16, 1)
        self.unused = nn.Linear(2, 2)
        self.first.bias.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(inputs)).float().tanh()
        return self.last(self.dropout(hidden).to(inputs.dtype))


class TiedText(nn.Module):
    """Four blocks with dropout between an embedding and a head that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)
        )
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def text(rows: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(11, (rows, 5), generator=generator)
    labels = ids.roll(1, 1)
    labels[0, 2:] = -100  # so microbatches count differently
    return {"ids": ids, "labels": labels}


def text_verdict_of(strategy: Any, rows: int = 8, world: int = 2, **options: Any) -> Verdict:
    """Of TiedText under a strategy; in the job of the ranks that call it."""
    model = TiedText()
    return verify(model, mls.plan(model, strategy, text(2), world=world, **options), text(rows))


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))


def pairs(num_samples: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(num_samples, 6, generator=generator)
    return inputs, inputs.sum(dim=1, keepdim=True).sin()


def squared_error(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(output, batch[1])


def plan_of(model: nn.Module, world: int = 2, strategy: Any = _BUCKETED, **options: Any) -> Plan:
    return mls.plan(model, strategy, pairs(2)[0], world=world, **options)


def verdict_of(model: nn.Module | None = None, num_samples: int = 12, **options: Any) -> Verdict:
    """Of a data-parallel plan on 2 ranks, in the job that calls it or on ranks of its own."""
    model = Net() if model is None else model
    settings = {
        key: options.pop(key) for key in ("precision", "tolerance", "max_grad_norm") if key in options
    }
    if "mode" in options:  # the plan's precision; "precision" is verify's
        options["precision"] = options.pop("mode")
    return verify(model, plan_of(model, **options), pairs(num_samples), loss=squared_error, **settings)
