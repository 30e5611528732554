"""What the stages of a pipeline hold at most, against what the simulator says.

    python benchmarks/pipeline_memory.py [--tokens 256] [--rows 2] [--json FILE]

A GPT of 8 blocks on 4 ranks, 8 microbatches. One microbatch that runs alone says what a stage keeps from its
forward to its backward, and between the two halves of a backward; the simulator multiplies these by what is
in flight under a schedule. Measured is the most that the C allocator had handed out at the end of any forward
or backward of a step, above what it had at the step's start. So gradients of parameters, which have their
place before, do not count, and nor does what one backward needs on its way.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from contest import allocated_bytes, as_size, machine, run_ranks, write_record
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

import mlsys_engine as mls
from mlsys_engine.pipeline import PipelineCosts, StageCosts, schedules, simulate
from mlsys_engine.pipeline.runtime.stage import Stage

RANKS, MICROBATCHES, WIDTH, BLOCKS = 4, 8, 256, 8
SCHEDULES = ("gpipe", "1f1b", "zb-h1")


class Block(nn.Module):
    """Attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, _ = x.shape  # batch, tokens
        q, k, v = self.mix(self.first(x)).view(B, T, 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, -1))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Watch:
    """Allocated bytes at the ends of forwards and backwards, above a step's start."""

    def __init__(self) -> None:
        self.start, self.seen = 0, [0]

    def step(self, runner: mls.Runner, batch: Any) -> list[int]:
        self.seen, self.start = [0], allocated_bytes()
        runner.step([batch])
        return self.seen

    def after(self, function: Any) -> Any:
        def watched(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            self.seen.append(allocated_bytes() - self.start)
            return result

        return watched


def runner_of(schedule: str, microbatches: int, batch: torch.Tensor) -> mls.Runner:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)))
    return mls.wrap(
        model,
        optimizer=functools.partial(mls.optim.SGD, lr=1e-3),
        loss=lambda output, batch: output.square().mean(),
        strategy=mls.PipelineParallel(RANKS, schedule, microbatches=microbatches),
        sample=batch,
    )


def measured(rows: int, tokens: int) -> dict[str, list[list[int]]]:
    """Of every rank: what one microbatch keeps, whole and between its halves, and each schedule's peak."""
    watch = Watch()
    found: dict[str, list[list[int]]] = {}
    with (
        mock.patch.object(Stage, "forward", watch.after(Stage.forward)),
        mock.patch.object(Stage, "backward", watch.after(Stage.backward)),
    ):
        for schedule in ("1f1b", "zb-h1"):
            one = torch.randn(rows, tokens, WIDTH)
            runner = runner_of(schedule, 1, one)
            for _ in range(2):
                _, whole, half = watch.step(runner, one)
            found[f"one microbatch, {schedule}"] = _of_all([whole, half])
        for schedule in SCHEDULES:
            batch = torch.randn(rows * MICROBATCHES, tokens, WIDTH)
            runner = runner_of(schedule, MICROBATCHES, batch)
            for _ in range(2):
                seen = watch.step(runner, batch)
            found[schedule] = _of_all([max(seen)])
    return found


def _of_all(own: list[int]) -> list[list[int]]:
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, own)
    return every


def simulated(schedule: str, found: dict[str, list[list[int]]], message_bytes: int) -> tuple[int, ...]:
    kept = found["one microbatch, zb-h1" if schedule == "zb-h1" else "one microbatch, 1f1b"]
    stages = tuple(
        StageCosts(activation_bytes=whole, weight_bytes=max(half, 0), output_bytes=message_bytes)
        for whole, half in kept
    )
    made = schedules.build(schedule, stages=RANKS, microbatches=MICROBATCHES, ranks=RANKS)
    return simulate(made, PipelineCosts(stages=stages)).peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2, help="of a microbatch")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    found = run_ranks(measured, RANKS, arguments.rows, arguments.tokens)
    message_bytes = arguments.rows * arguments.tokens * WIDTH * 4
    table = Table(title=f"peaks of 4 stages, 8 microbatches, on {machine()}")
    for column in ("schedule", "rank", "measured", "simulated", "difference"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    record: dict[str, Any] = {}
    for schedule in SCHEDULES:
        for rank, expected in enumerate(simulated(schedule, found, message_bytes)):
            (own,) = found[schedule][rank]
            table.add_row(schedule, f"{rank}", as_size(own), as_size(expected), f"{own / expected - 1:+.1%}")
            record[f"{schedule} {rank}"] = {"measured_bytes": own, "simulated_bytes": expected}
    Console(width=None if os.environ.get("COLUMNS") else 120).print(table)
    if arguments.json:
        write_record(arguments.json, peaks=record, one_microbatch=found)


if __name__ == "__main__":
    main()
