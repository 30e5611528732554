"""Every rule's step against our own AdamW's, and against torch's optimizer of that name where there is one.

    python benchmarks/optimizer_rules.py [--json FILE] [--threads 1 2] [--matrices 25] [--side 1000]
    python benchmarks/optimizer_rules.py --rules adamw lamb --matrices 1 --side 7071   # one tensor of 50M

All step the same float32 matrices with the same gradients, interleaved: each round times every system once,
in turn, and the minimum over rounds is reported. torch steps by its fastest way: fused, else foreach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from interleaved import options_of, show, take_turns, write_results

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


def systems(rules: Sequence[str], matrices: int, side: int) -> dict[str, Callable[[], object]]:
    """What is timed, by "rule" and "rule torch"; AdamW, which all are compared with, is always among them."""
    steps: dict[str, Callable[[], object]] = {}
    for rule in dict.fromkeys(("adamw", *rules)):
        options = {"lr": 1e-4, **OPTIONS.get(rule, {})}
        steps[rule] = optimizer_class(rule)(parameters(matrices, side), **options).step  # type: ignore[call-arg]
        if rule in TORCH and rule in rules:
            fastest = {"fused": True} if rule in FUSED else {}
            members = [parameter for _, parameter in parameters(matrices, side)]
            steps[f"{rule} torch"] = TORCH[rule](members, **options, **fastest).step
    return steps


def measure(rules: Sequence[str], matrices: int, side: int, rounds: int, threads: int) -> list[Result]:
    steps = systems(rules, matrices, side)
    take_turns(list(steps.values()), 1)  # makes the state
    times = take_turns(list(steps.values()), rounds)
    best = {name: min(samples) for name, samples in zip(steps, times, strict=True)}
    return [
        Result(
            rule,
            threads,
            best[rule] * 1e3,
            best[rule] / best["adamw"],
            best[f"{rule} torch"] / best[rule] if rule in TORCH else None,
        )
        for rule in rules
    ]


COLUMNS = ("rule", "threads", "best ms", "of our AdamW's time", "times faster than torch's")


def cells(result: Result) -> list[str]:
    """The result's row under COLUMNS."""
    faster = "" if result.against_torch is None else f"{result.against_torch:.2f}"
    return [result.rule, str(result.threads), f"{result.best_ms:.2f}", f"{result.of_adamw:.2f}", faster]


def main() -> None:
    parser = options_of(__doc__, threads=(1, 2), rounds=5)
    parser.add_argument("--rules", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--matrices", type=int, default=25)
    parser.add_argument("--side", type=int, default=1000, help="rows and columns of a matrix")
    options = parser.parse_args()
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        results += measure(options.rules, options.matrices, options.side, options.rounds, threads)
    size = f"{options.matrices} matrices of {options.side} x {options.side}, fp32"
    show(f"a step of every rule, {size}", COLUMNS, map(cells, results))
    write_results(
        options.json, matrices=options.matrices, side=options.side, rounds=options.rounds, results=results
    )


if __name__ == "__main__":
    main()
