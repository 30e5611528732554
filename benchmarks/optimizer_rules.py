"""Every rule's step against our own AdamW's, and against torch's optimizer of that name where there is one.

    python benchmarks/optimizer_rules.py [--json FILE] [--threads 1 2] [--matrices 25] [--side 1000]

All step the same float32 matrices with the same gradients, interleaved: each round times every system once,
in turn, and the minimum over rounds is reported. torch steps by its fastest way: fused, else foreach.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from optimizers import hardware
from rich.console import Console
from rich.table import Table

from mlsys_engine.optim import OPTIMIZERS, optimizer_class

TORCH = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "muon": torch.optim.Muon,
}
FUSED = {"adam", "adamw", "sgd", "adagrad"}
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}


@dataclass(frozen=True)
class Result:
    """A rule's best time, in times of our AdamW's, and how many times torch's it is faster."""

    rule: str
    threads: int
    best_ms: float
    of_adamw: float
    against_torch: float | None


def parameters(matrices: int, side: int) -> list[tuple[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    named = []
    for index in range(matrices):
        parameter = torch.nn.Parameter(torch.randn(side, side, generator=generator) * 0.02)
        parameter.grad = torch.randn(side, side, generator=generator)
        named.append((f"layers.{index}.weight", parameter))
    return named


def systems(matrices: int, side: int) -> dict[str, Callable[[], object]]:
    """What is timed, by "rule" and "rule torch"."""
    steps: dict[str, Callable[[], object]] = {}
    for rule in OPTIMIZERS:
        options = {"lr": 1e-4, **OPTIONS.get(rule, {})}
        steps[rule] = optimizer_class(rule)(parameters(matrices, side), **options).step  # type: ignore[call-arg]
        if rule in TORCH:
            fastest = {"fused": True} if rule in FUSED else {}
            members = [parameter for _, parameter in parameters(matrices, side)]
            steps[f"{rule} torch"] = TORCH[rule](members, **options, **fastest).step
    return steps


def measure(matrices: int, side: int, rounds: int, threads: int) -> list[Result]:
    steps = systems(matrices, side)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    best = {name: min(samples) for name, samples in times.items()}
    return [
        Result(
            rule,
            threads,
            best[rule] * 1e3,
            best[rule] / best["adamw"],
            best[f"{rule} torch"] / best[rule] if rule in TORCH else None,
        )
        for rule in OPTIMIZERS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--matrices", type=int, default=25)
    parser.add_argument("--side", type=int, default=1000, help="rows and columns of a matrix")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        results += measure(options.matrices, options.side, options.rounds, threads)
    machine = hardware()
    size = f"{options.matrices} matrices of {options.side} x {options.side}, fp32"
    table = Table(title=f"a step of every rule, {size}\n{machine['cpu']}, {machine['simd']}")
    for column in ("rule", "threads", "best ms", "of our AdamW's time", "times faster than torch's"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for row in results:
        faster = "" if row.against_torch is None else f"{row.against_torch:.2f}"
        table.add_row(row.rule, str(row.threads), f"{row.best_ms:.2f}", f"{row.of_adamw:.2f}", faster)
    Console(width=100).print(table)
    if options.json:
        record = {
            "hardware": machine,
            "matrices": options.matrices,
            "side": options.side,
            "rounds": options.rounds,
            "results": [asdict(row) for row in results],
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
