"""How long a DDP step waits for communication: torch's DDP, unchanged, on backend mlsys and on gloo.

    python benchmarks/data_parallel_step.py [--ranks 2] [--rounds 40] [--json FILE]

A 25M-parameter model steps at batch 1, so that there is little to hide communication behind. Contestants
take turns round by round on the same ranks: DDP over mlsys, DDP over gloo, DDP with a hook that does nothing
in place of the all-reduce, and DDP that does not synchronise at all (`no_sync`). Exposed communication is
what a step takes beyond the one with the empty hook, which does all that DDP does around the communication.
It is measured with gradients that are views of DDP's buckets (`gradient_as_bucket_view=True`) and with DDP's
default, which copies them in and out of the buckets. At the end the two backends' gradients are compared.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from contest import Contestant, Timing, as_cell, as_time, machine, run_ranks, run_rounds, write_record
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WIDTH, DEPTH = 2048, 6  # 6 x 2048 x 2049 parameters: 25.2M
MLSYS, GLOO, SILENT, ALONE = "DDP on mlsys", "DDP on gloo", "an empty hook", "no_sync"
MODES = VIEWS, COPIES = "views of buckets", "copied"


class Step:
    """One replica and its step."""

    def __init__(self, group: dist.ProcessGroup, as_views: bool) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.model = DistributedDataParallel(
            nn.Sequential(*layers), process_group=group, gradient_as_bucket_view=as_views
        )
        self.batch = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def run(self) -> None:
        self.model(self.batch).square().sum().backward()

    def silence(self) -> Step:
        """From now on no bucket is sent anywhere."""
        self.model.register_comm_hook(None, lambda _state, bucket: _done(bucket.buffer()))
        return self

    def run_alone(self) -> None:
        with self.model.no_sync():
            self.run()

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]


def _done(tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(tensor)
    return future


def run_steps(rounds: int) -> dict[str, dict[str, Timing]]:
    """What every rank runs."""
    gloo = dist.new_group(backend="gloo")
    return {mode: run_mode(mode == VIEWS, gloo, rounds) for mode in MODES}


def run_mode(as_views: bool, gloo: dist.ProcessGroup, rounds: int) -> dict[str, Timing]:
    ours, theirs = Step(dist.group.WORLD, as_views), Step(gloo, as_views)
    silent = Step(dist.group.WORLD, as_views).silence()
    contestants = [
        Contestant(name=MLSYS, call=ours.run, prepare=ours.clear),
        Contestant(name=GLOO, call=theirs.run, prepare=theirs.clear),
        Contestant(name=SILENT, call=silent.run, prepare=silent.clear),
        Contestant(name=ALONE, call=ours.run_alone, prepare=ours.clear),
    ]
    timings = run_rounds(contestants, seconds=0.0, min_rounds=rounds, max_rounds=rounds)[1]
    for step in (ours, theirs):
        step.clear()
        step.run()
    for mine, other in zip(ours.gradients(), theirs.gradients(), strict=True):
        torch.testing.assert_close(mine, other)
    return timings


def exposed_s(timings: dict[str, Timing], name: str) -> float:
    """Seconds of a median step beyond one that does everything but communicate."""
    return timings[name].median_s - timings[SILENT].median_s


def show(by_world: dict[int, dict[str, dict[str, Timing]]]) -> None:
    table = Table(title=f"a DDP step of 25.2M parameters, batch 1, on {machine()}")
    for column in ("ranks", "gradients", "step", "min / median (quartiles)", "exposed", "than on gloo"):
        table.add_column(column, justify="left" if column in ("gradients", "step") else "right")
    for world_size, by_mode in by_world.items():
        for mode, timings in by_mode.items():
            ratio = exposed_s(timings, GLOO) / exposed_s(timings, MLSYS)
            for name, timing in timings.items():
                exposed = as_time(exposed_s(timings, name)) if name in (MLSYS, GLOO) else ""
                less = f"{ratio:.1f}x less" if name == MLSYS else ""
                table.add_row(str(world_size), mode, name, as_cell(timing), exposed, less)
    Console(width=None if os.environ.get("COLUMNS") else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="world sizes")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    by_world = {size: run_ranks(run_steps, size, arguments.rounds) for size in arguments.ranks}
    show(by_world)
    if arguments.json:
        write_record(arguments.json, by_world_size=by_world)


if __name__ == "__main__":
    main()
