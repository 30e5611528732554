"""Whether narrow forms train as float32 does: a GPT on bytes of source text, and drawn digits, several seeds.

    python benchmarks/optimizer_convergence.py [--json FILE] [--seeds 5] [--steps 300]

Every form of AdamW trains the same initial models on the same batches; what differs between forms is storage
and rounding, what differs between seeds is initialisation and data. Reported: validation loss as mean and
standard deviation over seeds, and how far a form's mean is from float32's in standard deviations of float32.
The run fails when a split and an fp32 master of one bf16 model are not the same bits after all steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import show, write_results
from torch import Tensor, nn

from mlsys_engine.data import stdlib_corpus
from mlsys_engine.models import GPT, GPTConfig
from mlsys_engine.optim import AdamW

FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 moments": (torch.float32, {"moments": "bf16"}),
    "fp32, int8 moments": (torch.float32, {"moments": "int8"}),
    "bf16 split": (torch.bfloat16, {"master": "split"}),
    "bf16 fp32 master": (torch.bfloat16, {"master": "fp32"}),
    "bf16 split, int8 moments": (torch.bfloat16, {"master": "split", "moments": "int8"}),
    "bf16 without master": (torch.bfloat16, {"master": None}),
    "bf16 without master, int8 moments": (torch.bfloat16, {"master": None, "moments": "int8"}),
}
# Rows of 5 by 7 pictures, top to bottom, of the digits 0 to 9.
GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)

Batches = Callable[[torch.Generator], tuple[Tensor, Tensor]]
LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Text:
    """A small GPT on windows of source text; next-byte loss."""

    name, lr = "GPT on bytes", 3e-3

    def __init__(self) -> None:
        corpus = stdlib_corpus(max_bytes=2_000_000)
        self._parts = {True: torch.tensor(corpus.train), False: torch.tensor(corpus.validation)}

    def model(self) -> GPT:
        return GPT(GPTConfig(vocab_size=256, context_length=64, num_layers=2, num_heads=2, width=64))

    def batch(self, generator: torch.Generator, *, train: bool) -> tuple[Tensor, Tensor]:
        text = self._parts[train]
        starts = torch.randint(len(text) - 64, (16,), generator=generator)
        windows = torch.stack([text[start : start + 64] for start in starts.tolist()]).long()
        return windows, windows

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(inputs, labels=targets).loss
        return loss


class Digits:
    """A perceptron on noisy, shifted pictures of digits; cross-entropy."""

    name, lr = "drawn digits", 1e-2

    def __init__(self) -> None:
        rows = [[[float(bit) for bit in row] for row in glyph.split()] for glyph in GLYPHS]
        self._glyphs = torch.tensor(rows)  # [10, 7, 5]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(100, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def batch(self, generator: torch.Generator, *, train: bool) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (64,), generator=generator)
        pictures = torch.randn(64, 10, 10, generator=generator) * 0.7
        places = torch.randint(4, (64, 2), generator=generator).tolist()
        for picture, label, (top, left) in zip(pictures, labels.tolist(), places, strict=True):
            picture[top : top + 7, left : left + 5] += self._glyphs[label]
        return pictures.view(64, 100), labels

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        dtype = next(model.parameters()).dtype
        return nn.functional.cross_entropy(model(inputs.to(dtype)).float(), targets)


Task = Text | Digits


def fit(task: Task, model: nn.Module, optimizer: AdamW, seed: int, steps: int) -> list[float]:
    """Trains on the seed's batches, warmed up and decayed to zero; the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = task.lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = task.loss(model, *task.batch(generator, train=True))
        loss.backward()
        optimizer.step_scaled(zero_grad=True)
        losses.append(loss.item())
    return losses


def validation_loss(task: Task, model: nn.Module) -> float:
    """The mean loss of 20 batches that no training sees, the same ones for every model."""
    generator = torch.Generator().manual_seed(10**6)
    with torch.no_grad():
        return statistics.fmean(
            float(task.loss(model, *task.batch(generator, train=False))) for _ in range(20)
        )


def train(task: Task, form: str, seed: int, steps: int) -> tuple[float, list[Tensor]]:
    """The validation loss, and the parameters, after training in one form from one seed."""
    dtype, options = FORMS[form]
    torch.manual_seed(seed)
    model = task.model().to(dtype)
    optimizer = AdamW(model.named_parameters(), lr=task.lr, weight_decay=0.1, **options)
    fit(task, model, optimizer, seed, steps)
    return validation_loss(task, model), [parameter.detach().clone() for parameter in model.parameters()]


COLUMNS = ("task", "form", "mean", "standard deviation", "from fp32, in its deviations")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for task in (Text(), Digits()):
        wide: list[float] = []
        masters: dict[str, list[list[Tensor]]] = {}
        for form in FORMS:
            runs = [train(task, form, seed, options.steps) for seed in range(options.seeds)]
            losses = [loss for loss, _ in runs]
            wide = wide or losses
            if form in {"bf16 split", "bf16 fp32 master"}:
                masters[form] = [parameters for _, parameters in runs]
            mean, spread = statistics.fmean(losses), statistics.stdev(losses)
            apart = (mean - statistics.fmean(wide)) / statistics.stdev(wide)
            results.append({"task": task.name, "form": form, "losses": losses, "apart": apart})
            rows.append([task.name, form, f"{mean:.4f}", f"{spread:.4f}", f"{apart:+.2f}"])
        pairs = zip(masters["bf16 split"], masters["bf16 fp32 master"], strict=True)
        if not all(torch.equal(a, b) for split, whole in pairs for a, b in zip(split, whole, strict=True)):
            sys.exit(f"{task.name}: a split and an fp32 master ended with different bits.")
    show(f"validation loss after {options.steps} steps, {options.seeds} seeds", COLUMNS, rows)
    write_results(options.json, steps=options.steps, results=results)


if __name__ == "__main__":
    main()
