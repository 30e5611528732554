"""Whether packed activations train as whole ones do: a small GPT on bytes of source text, several seeds.

    python benchmarks/activation_convergence.py [--json FILE] [--seeds 5] [--steps 300]

Every system trains the same initial models on the same batches with AdamW; what differs between systems is
what the blocks keep for the backward, what differs between seeds is initialisation and data. Reported: how
many times fewer bytes the blocks keep, the validation loss as mean and standard deviation over seeds, and
whether the mean is within one standard deviation of plain's. The run fails when "selective", which is
lossless, gives another loss than plain in any step, or when int8 keeps more than a third of plain's bytes.
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
from optimizer_convergence import Text, fit, validation_loss

from mlsys_engine.activation import apply_actions, checkpoint, resolve
from mlsys_engine.memory import SavedActivationMeter
from mlsys_engine.models import GPT
from mlsys_engine.optim import AdamW

PLAIN, LOSSLESS, INT8 = "plain", "selective", "int8"
SYSTEMS: dict[str, Callable[[GPT], object]] = {
    PLAIN: lambda model: None,
    LOSSLESS: lambda model: checkpoint(model, policy="selective"),
    "selective, bf16": lambda model: checkpoint(model, policy="selective", lossy="bf16"),
    "selective, int8": lambda model: checkpoint(model, policy="selective", lossy="int8"),
    "selective, fp8": lambda model: checkpoint(model, policy="selective", lossy="fp8"),
    INT8: lambda model: apply_actions(model, dict.fromkeys(resolve(model, "full"), "int8")),
}


def build(task: Text, system: str, seed: int) -> GPT:
    """The seed's initial model, with what its blocks keep as the system has it."""
    torch.manual_seed(seed)
    model = task.model()
    SYSTEMS[system](model)
    return model


def saved_bytes(task: Text, system: str) -> int:
    """What the blocks keep of one batch for the backward, in bytes."""
    model = build(task, system, 0)
    inputs, _ = task.batch(torch.Generator().manual_seed(0), train=True)
    x_BTD = model.embedding(inputs)
    with SavedActivationMeter(model) as meter:
        for block in model.blocks:
            x_BTD = block(x_BTD)
        return meter.peak_bytes


def train(task: Text, system: str, seed: int, steps: int) -> tuple[float, list[float]]:
    """The validation loss after training, and the loss of every step."""
    model = build(task, system, seed)
    optimizer = AdamW(model.named_parameters(), lr=task.lr, weight_decay=0.1)
    losses = fit(task, model, optimizer, seed, steps)
    return validation_loss(task, model), losses


COLUMNS = (
    "system", "fewer bytes", "mean", "standard deviation", "from plain, in its deviations", "within one"
)  # fmt: skip


def cells(result: dict[str, Any], plain_bytes: int) -> list[str]:
    """The result's row under COLUMNS."""
    losses, apart = result["losses"], result["apart"]
    return [
        result["system"],
        f"{plain_bytes / result['saved_bytes']:.2f}",
        f"{statistics.fmean(losses):.4f}",
        f"{statistics.stdev(losses):.4f}",
        f"{apart:+.2f}",
        "yes" if abs(apart) <= 1.0 else "no",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    task = Text()
    kept = {system: saved_bytes(task, system) for system in SYSTEMS}
    if kept[PLAIN] < 3 * kept[INT8]:
        sys.exit(f"int8 keeps {kept[INT8]} bytes of plain's {kept[PLAIN]}: a third was to be had.")
    runs = {
        system: [train(task, system, seed, options.steps) for seed in range(options.seeds)]
        for system in SYSTEMS
    }
    if runs[LOSSLESS] != runs[PLAIN]:
        sys.exit(f"{LOSSLESS} is lossless, but its losses differ from plain's.")
    plain = [loss for loss, _ in runs[PLAIN]]
    results: list[dict[str, Any]] = []
    for system in SYSTEMS:
        losses = [loss for loss, _ in runs[system]]
        apart = (statistics.fmean(losses) - statistics.fmean(plain)) / statistics.stdev(plain)
        results.append({"system": system, "saved_bytes": kept[system], "losses": losses, "apart": apart})
    rows = [cells(result, kept[PLAIN]) for result in results]
    show(f"validation loss after {options.steps} steps, {options.seeds} seeds", COLUMNS, rows)
    write_results(options.json, steps=options.steps, results=results)


if __name__ == "__main__":
    main()
