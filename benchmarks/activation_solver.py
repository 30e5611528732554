"""The budget solver's time by the length of the chain, and what its schedules cost by the budget.

    python benchmarks/activation_solver.py [--json FILE] [--blocks 12 48 96 400] [--slots 0 2000]

Blocks like a transformer's, each with five options and costs of its own (seeded); and once all equal, as in a
real model of one kind of block. One table answers all budgets, which lie between the least that the chain can
run in (0%) and what its fastest options need (100%). One thread; the minimum and the median of the repeats.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from contest import machine, write_record
from rich.console import Console
from rich.table import Table

from mlsys_engine.activation.chain import BlockCosts, Chain, OptionCosts
from mlsys_engine.activation.solver import curve, memory_range

MIB = 2**20
# Beyond the forward's and the backward's own time, in forwards; and bytes saved, in inputs.
OPTIONS = {
    "keep": (0.0, 0.0, 34),
    "selective": (0.0, 0.05, 22),
    "packed": (0.03, 0.12, 12),
    "offloaded": (0.1, 0.15, 5),
    "recompute": (0.0, 1.0, 1),
}
PERCENTS = (1, 2, 5, 10, 20, 30, 50, 70, 90)


@dataclass(frozen=True)
class Result:
    """The time of one table with all schedules, and their overhead over the fastest."""

    blocks: int
    equal: bool
    slots: int
    unit_bytes: int
    problems: int
    best_ms: float
    median_ms: float
    overhead_percent: tuple[float, ...]  # at each of PERCENTS


def transformer_like(num_blocks: int, equal: bool) -> Chain:
    generator = random.Random(0)
    blocks = []
    for place in range(num_blocks):
        scale = 1.0 if equal else generator.uniform(0.5, 1.5)
        size, forward_s = int(scale * MIB), 0.01 * scale
        options = tuple(
            OptionCosts(
                name=name,
                forward_s=forward_s * (1 + more_forward),
                backward_s=forward_s * (2 + more_backward * (1.0 if equal else generator.uniform(0.5, 1.5))),
                saved_bytes=saved * size,
                forward_peak_bytes=(saved + 6) * size,
                backward_peak_bytes=(saved + 8) * size,
            )
            for name, (more_forward, more_backward, saved) in OPTIONS.items()
        )
        blocks.append(
            BlockCosts(
                name=f"blocks.{place}",
                input_bytes=size,
                options=options,
                drop_forward_s=forward_s,
                drop_peak_bytes=8 * size,
                output_gradient_bytes=size,
            )
        )
    return Chain(blocks=tuple(blocks))


def measure(num_blocks: int, equal: bool, slots: int, repeats: int) -> Result:
    chain = transformer_like(num_blocks, equal)
    memory = memory_range(chain)
    width = memory.enough_bytes - memory.least_bytes
    budgets = [memory.least_bytes + width * percent // 100 for percent in PERCENTS]
    fastest_s = curve(chain, [memory.enough_bytes]).schedules[0].seconds
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        solved = curve(chain, budgets, num_slots=slots or None)
        times.append((time.perf_counter() - begin) * 1e3)
    return Result(
        num_blocks,
        equal,
        solved.num_slots,
        solved.unit_bytes,
        solved.num_problems,
        min(times),
        statistics.median(times),
        tuple(100 * (schedule.seconds / fastest_s - 1) for schedule in solved.schedules),
    )


def show(results: list[Result]) -> None:
    table = Table(title=f"budget solver, 5 options a block, 1 thread\n{machine()}")
    for column in ("blocks", "slots", "problems", "best ms", "median ms"):
        table.add_column(column, justify="right")
    table.add_column(f"overhead % at {', '.join(map(str, PERCENTS))}% of the memory", justify="right")
    for row in results:
        kind = "equal" if row.equal else "different"
        overheads = " ".join(f"{value:.1f}" for value in row.overhead_percent)
        table.add_row(
            f"{row.blocks} {kind}",
            str(row.slots),
            str(row.problems),
            f"{row.best_ms:.1f}",
            f"{row.median_ms:.1f}",
            overheads,
        )
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--blocks", type=int, nargs="+", default=[12, 48, 96, 400])
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 2000], help="0: the solver's own choice")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    results = [
        measure(num_blocks, equal, slots, options.repeats)
        for num_blocks in options.blocks
        for equal in (False, True)
        for slots in options.slots
    ]
    show(results)
    if options.json:
        write_record(options.json, percents=PERCENTS, results=results)


if __name__ == "__main__":
    main()
