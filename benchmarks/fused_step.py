"""The fused step against an all-reduce and an optimizer step, interleaved in one run, every result checked.

    python benchmarks/fused_step.py [--ranks 2 4] [--numel 25000000] [--seconds 20] [--json FILE]

    fused           reduce_scatter_optimize_all_gather in one pass: no norm
    fused, clipped  what DataParallel(shard="optimizer") does: reduce_shard sums squares on the way, an
                    all-reduce of the terms, then the step of the reduced shard into all ranks
    unsharded       mlsys all-reduce and mls.optim.AdamW on every rank, clipped by its own norm pass
    gloo + torch    gloo all-reduce and torch.optim.AdamW(fused=True), plain and with clip_grad_norm_
    sweep           all ranks reading and writing a buffer of the gradient's size at once: the bandwidth

The ceiling is the fewest bytes that a way can move over the sweep's bandwidth. With n bytes of gradient and p
ranks, each rank reads its shard of p gradients (n), of the parameters and two moments (3n/p), and writes two
moments (2n/p) and p parameters (n): 2n + 5n/p. Clipping stores the reduced shard and reads it again: 2n/p
more, against n for reading all gradients twice.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contest import Case, Contestant, as_cell, machine, run_ranks, run_rounds, write_record
from rich.console import Console
from rich.table import Table

from mlsys_engine import comm, optim
from mlsys_engine.memory.flat_arena import FlatArena, Slot
from mlsys_engine.optim.kernels import CHUNK_ELEMENTS
from mlsys_engine.optim.shard import OptimizerShard

FUSED, CLIPPED, UNSHARDED = "fused", "fused, clipped", "unsharded, clipped"
GLOO, GLOO_CLIPPED, SWEEP = "gloo + torch", "gloo + torch, clipped", "sweep"
PEER = {FUSED: GLOO, CLIPPED: GLOO_CLIPPED, UNSHARDED: GLOO_CLIPPED}
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MAX_NORM = 1.0
SAMPLE = 1000  # elements that are compared with float64 arithmetic


class Reference:
    """AdamW of some elements in float64, always with the same gradient (Loshchilov & Hutter 2019)."""

    def __init__(self, gradient: torch.Tensor, scale: float) -> None:
        self.index = torch.arange(SAMPLE) * (len(gradient) - 1) // (SAMPLE - 1)
        self.gradient = gradient[self.index].double() * scale
        self.value, self.steps = torch.ones(SAMPLE, dtype=torch.float64), 0
        self.first = torch.zeros(SAMPLE, dtype=torch.float64)
        self.second = torch.zeros(SAMPLE, dtype=torch.float64)

    def check(self, values: torch.Tensor) -> None:
        """Takes a step and compares. fp32 rounds each of a few operations a step by 6e-8 of a value of 1."""
        (beta1, beta2), self.steps = SETTINGS["betas"], self.steps + 1
        self.first = beta1 * self.first + (1 - beta1) * self.gradient
        self.second = beta2 * self.second + (1 - beta2) * self.gradient**2
        self.value *= 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
        corrected = (self.second / (1 - beta2**self.steps)).sqrt() + SETTINGS["eps"]
        self.value -= SETTINGS["lr"] * self.first / (1 - beta1**self.steps) / corrected
        difference = (values[self.index].double() - self.value).abs().max().item()
        if not difference < 4 * 6e-8 * (self.steps + 4):
            raise AssertionError(f"a result is {difference} off after {self.steps} steps")


class Ours:
    """Parameters and gradients in the arena, and the moments of this rank's shard."""

    def __init__(self, numel: int) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        slots = (Slot(name="all", offset=0, numel=numel, shape=(numel,)),)
        self.params = FlatArena(comm.empty(numel), slots)
        self.grads = FlatArena(comm.empty(numel), slots)
        self.params.data.fill_(1.0)
        self.parameter = torch.nn.Parameter(self.params.data)
        self.parameter.grad = self.grads.data
        self.optimizer = optim.AdamW([("all", self.parameter)], **SETTINGS)
        chunks = math.ceil(numel / CHUNK_ELEMENTS)
        self.cuts = [min(chunks * r // ranks * CHUNK_ELEMENTS, numel) for r in range(ranks)] + [numel]
        first, end = self.cuts[rank], self.cuts[rank + 1]
        self.shard = OptimizerShard(self.optimizer, self.params, self.grads, [(first, end)])
        starts = torch.arange(first, end, CHUNK_ELEMENTS)
        self.chunks = torch.stack(
            [starts, (end - starts).clamp(max=CHUNK_ELEMENTS), starts // CHUNK_ELEMENTS], dim=1
        )
        self.terms = torch.zeros(chunks, dtype=torch.float64)

    def fused(self) -> None:
        self._step(1.0, is_reduced=False)

    def clipped(self) -> None:
        self.terms.zero_()
        comm.reduce_shard(self.grads.data, self.cuts, chunks=self.chunks, sums=self.terms)
        dist.all_reduce(self.terms)
        self._step(float(optim.clip_scale(self.terms.sum(), MAX_NORM)), is_reduced=True)

    def _step(self, scale: float, *, is_reduced: bool) -> None:
        self.shard.advance()
        comm.reduce_scatter_optimize_all_gather(
            self.grads.data,
            self.params.data,
            self.cuts,
            self.shard.table(),
            grad_scale=scale,
            is_reduced=is_reduced,
        )

    def unsharded(self) -> None:
        dist.all_reduce(self.grads.data)
        self.optimizer.step_scaled(grad_scale=optim.clip_scale(self.optimizer.sum_of_squares(), MAX_NORM))


class Theirs:
    """gloo and torch on private memory."""

    def __init__(self, numel: int, gloo: dist.ProcessGroup) -> None:
        self.gloo = gloo
        self.parameter = torch.nn.Parameter(torch.ones(numel))
        self.gradient = self.parameter.grad = torch.zeros(numel)
        self.optimizer = torch.optim.AdamW([self.parameter], fused=True, **SETTINGS)

    def plain(self) -> None:
        dist.all_reduce(self.gradient, group=self.gloo)
        self.optimizer.step()

    def clipped(self) -> None:
        dist.all_reduce(self.gradient, group=self.gloo)
        torch.nn.utils.clip_grad_norm_([self.parameter], MAX_NORM)
        self.optimizer.step()


def contest(numel: int, seconds: float, only: tuple[str, ...]) -> Case:
    """One rank's part: some of the contestants at once, since each has its own parameters and moments."""
    gloo = dist.new_group(backend="gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    base = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    total = base * (ranks * (ranks + 1) / 2)
    clip = min(1.0, MAX_NORM / (float(total.double().norm()) + 1e-6))

    def contestant(name: str) -> Contestant:
        if name == SWEEP:
            swept = torch.ones(numel)
            return Contestant(name=name, call=lambda: swept.mul_(1.0))
        if name in (GLOO, GLOO_CLIPPED):
            theirs = Theirs(numel, gloo)
            call: Callable[[], None] = theirs.clipped if name == GLOO_CLIPPED else theirs.plain
            values, gradient = theirs.parameter.detach(), theirs.gradient
        else:
            ours = Ours(numel)
            call = {FUSED: ours.fused, CLIPPED: ours.clipped, UNSHARDED: ours.unsharded}[name]
            values, gradient = ours.params.data, ours.grads.data
        reference = Reference(total, 1.0 if name in (FUSED, GLOO) else clip)
        return Contestant(
            name=name,
            call=call,
            prepare=lambda: torch.mul(base, rank + 1.0, out=gradient),
            check=lambda: reference.check(values),
        )

    rounds, timings = run_rounds([contestant(name) for name in only], seconds=seconds)
    return Case(operation="fused_step", world_size=ranks, bytes=numel * 4, rounds=rounds, timings=timings)


def ceiling(case: Case, name: str) -> float:
    """Seconds in which the bytes that `name` cannot do without pass at the sweep's bandwidth."""
    moved = 2 + (5 if name == FUSED else 7) / case.world_size
    return case.timings[SWEEP].median_s * moved / 2  # a sweep moves every byte twice


def show(cases: list[Case], numel: int) -> None:
    table = Table(title=f"fused step of {numel:,} fp32 parameters on {machine()}: min / median (quartiles)")
    for column in ("ranks", "way", "time", "faster than gloo + torch", "ceiling", "of the ceiling"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for case in cases:
        for name, timing in case.timings.items():
            fused = name in (FUSED, CLIPPED)
            limit = ceiling(case, name) if fused else 0.0
            table.add_row(
                str(case.world_size),
                name,
                as_cell(timing),
                f"{case.speedup(name, PEER[name]):.1f}x"
                if name in PEER and PEER[name] in case.timings
                else "",
                f"{limit * 1e3:.1f} ms" if fused else "",
                f"{limit / timing.median_s:.0%}" if fused else "",
            )
    Console(width=None).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--numel", type=int, default=25_000_000, help="fp32 parameters")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the rounds of one contest")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    contests = (FUSED, GLOO, SWEEP), (CLIPPED, UNSHARDED, GLOO_CLIPPED, SWEEP)
    cases = [
        run_ranks(contest, ranks, arguments.numel, arguments.seconds, only)
        for ranks in arguments.ranks
        for only in contests
    ]
    show(cases, arguments.numel)
    if arguments.json:
        write_record(arguments.json, numel=arguments.numel, cases=cases)


if __name__ == "__main__":
    main()
