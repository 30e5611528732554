"""What the pipeline's runtime adds to a schedule: stages that sleep, against the simulator's makespan.

    python benchmarks/pipeline_bubble.py --json pipeline_bubble.json

Four ranks run every named schedule with 8 microbatches. A forward, an input gradient and a weight gradient of
a stage take a fixed sleep each, which needs no core, so the ranks do not disturb each other; what is measured
above the simulated makespan is the runtime's: messages, autograd, generators, bookkeeping.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import machine, run_ranks, write_record
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from mlsys_engine.pipeline import PipelineCosts, schedules, simulate
from mlsys_engine.pipeline.runtime import PipelineAccumulation, PlannedSchedule

RANKS, MICROBATCHES = 4, 8
TWO_STAGES = ("interleaved-1f1b", "zb-v", "dualpipe-v")


class Sleep(torch.autograd.Function):
    """The identity, which takes some seconds in each direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradient, None


@dataclass(frozen=True)
class Result:
    output: Any
    sent: tuple[torch.Tensor, ...]


class SleepingPart:
    """One stage: a product of small matrices that takes `seconds` for each of F, I and W."""

    def __init__(self, weight: nn.Parameter, stage: int, stages: int, seconds: float) -> None:
        self._weight, self._stage, self._stages, self._seconds = weight, stage, stages, seconds

        def wait(gradient: torch.Tensor) -> None:
            time.sleep(seconds)

        weight.register_hook(wait)

    def run(self, forward: Any, receive: Callable[[torch.Tensor], torch.Tensor], *, signature: Any) -> Result:
        x = receive(torch.empty(8, 64, device="meta")) if self._stage else torch.ones(8, 64).requires_grad_()
        y = functional.linear(Sleep.apply(x, self._seconds), self._weight)
        if self._stage + 1 == self._stages:
            return Result((y.sum(), torch.ones((), dtype=torch.float64)), ())
        return Result(None, (y,))


class Gradients:
    """One process a stage: nothing is reduced."""

    num_buckets = 0

    def start(self, num_backwards: int) -> None: ...

    def ready(self, parameter: nn.Parameter) -> None: ...

    def launch(self, bucket: int) -> None: ...

    def end_backward(self) -> None: ...


def measured(name: str, steps: int, seconds: float) -> list[float]:
    """Seconds of each step on the slowest rank."""
    stages = RANKS * (2 if name in TWO_STAGES else 1)
    planned = PlannedSchedule(name, stages=stages, ranks=RANKS, pieces=MICROBATCHES)
    own = [stage for stage, rank in enumerate(planned.placement) if rank == dist.get_rank()]
    model = nn.ParameterList(nn.Parameter(torch.eye(64)) for _ in range(stages))
    group = dist.group.WORLD
    assert group is not None
    run = PipelineAccumulation(
        schedule=planned,
        model=model,
        parts={stage: SleepingPart(model[stage], stage, stages, seconds) for stage in own},
        group=group,
        device=torch.device("cpu"),
        gradients=Gradients(),
        stage_of_bucket=(),
    )
    times = []
    for _ in range(steps + 1):
        dist.barrier()
        begin = time.perf_counter()
        run.run([torch.ones(MICROBATCHES, 1)], lambda batch: None, lambda phase: None)  # type: ignore[arg-type, return-value]
        took = torch.tensor(time.perf_counter() - begin)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.append(took.item())
    return times[1:]  # shapes are told in the first


def run_all(steps: int, seconds: float) -> dict[str, list[float]]:
    """What every rank runs."""
    torch.set_num_threads(1)
    return {name: measured(name, steps, seconds) for name in schedules.SCHEDULES}


def simulated(name: str, seconds: float) -> tuple[float, float]:
    """The makespan and the share of bubbles."""
    stages = RANKS * (2 if name in TWO_STAGES else 1)
    schedule = schedules.build(name, stages=stages, microbatches=MICROBATCHES)
    costs = PipelineCosts.even(stages, forward_s=seconds, input_s=seconds, weight_s=seconds)
    found = simulate(schedule, costs)
    return found.makespan_s, found.bubble_share


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of each F, I and W")
    arguments = parser.parse_args()
    seconds = arguments.milliseconds / 1000
    times = run_ranks(run_all, RANKS, arguments.steps, seconds)
    table = Table(
        title=f"{RANKS} ranks, {MICROBATCHES} microbatches, F = I = W = {seconds:.3f} s\n{machine()}"
    )
    for column in (
        "schedule",
        "simulated",
        "bubbles",
        "measured (min / median)",
        "above",
        "bubbles measured",
    ):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    rows = []
    for name, samples in times.items():
        expected, bubbles = simulated(name, seconds)
        middle = statistics.median(samples)
        found = 1 - expected * (1 - bubbles) / middle
        rows.append({"schedule": name, "simulated_s": expected, "bubbles": bubbles, "measured_s": samples})
        table.add_row(
            name,
            f"{expected:.3f} s",
            f"{bubbles:.1%}",
            f"{min(samples):.3f} / {middle:.3f} s",
            f"{middle / expected - 1:+.1%}",
            f"{found:.1%}",
        )
    Console(width=140).print(table)
    if arguments.json:
        write_record(arguments.json, rows=rows, ranks=RANKS, microbatches=MICROBATCHES, seconds=seconds)


if __name__ == "__main__":
    main()
