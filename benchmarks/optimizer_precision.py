"""AdamW steps of bf16 models and narrow moments against torch's passes, interleaved in one run.

    python benchmarks/optimizer_precision.py [--json FILE] [--threads 1 2] [--numel N] [--rounds N]

Whole step of a bf16 model: torch casts gradients to fp32, clips, steps fp32 weights by its fused kernel and
casts them back; with loss scaling it also unscales and tests the gradients. Ours is a norm pass and one step.
Steps alone: every stored form against torch's fused kernel on fp32. Each round times every system once, in
turn; the minimum over rounds is reported. All systems take the same steps on the same numbers, and the run
fails when their parameters end further apart than their rounding explains.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from interleaved import options_of, show, take_turns, write_results
from torch import Tensor

from mlsys_engine.optim import AdamW, LossScaler, clip_scale

MAX_NORM, LOSS_SCALE, LR = 1.0, 1024.0, 1e-3


@dataclass
class Case:
    """One timed system of one workload; the first of a workload is what the others are compared with."""

    workload: str
    system: str
    run: Callable[[], object]
    bytes_stored: float  # a parameter, with parameter and gradient
    parameter: Tensor
    tolerance: float  # of parameters against the first system's, relative to their size and movement


@dataclass(frozen=True)
class Result:
    """Times of one system; `speedup` is the first system's minimum over its own."""

    workload: str
    system: str
    threads: int
    best_ms: float
    median_ms: float
    bytes_stored: float
    speedup: float


def values(numel: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(numel, generator=generator).bfloat16()
    gradient = (torch.rand(numel, generator=generator) + 0.5) * torch.where(weight.float() > 0, 1.0, -1.0)
    return weight, gradient.bfloat16()


class TorchMixed:
    """A bf16 parameter and gradient, and the fp32 copies that torch's own optimizer steps."""

    def __init__(self, numel: int, *, scaled: bool) -> None:
        weight, self.gradient = values(numel)
        self.model = weight
        self.master = torch.nn.Parameter(weight.float())
        self.master.grad = torch.zeros(numel)
        self.scaled = scaled
        if scaled:
            self.gradient = self.gradient * LOSS_SCALE
        self.inverse, self.found_inf = torch.tensor(1 / LOSS_SCALE), torch.zeros(1)
        self.optimizer = torch.optim.AdamW([self.master], lr=LR, fused=True)

    def __call__(self) -> None:
        gradient = self.master.grad
        assert gradient is not None
        gradient.copy_(self.gradient)
        if self.scaled:
            self.found_inf.zero_()
            torch._amp_foreach_non_finite_check_and_unscale_([gradient], self.found_inf, self.inverse)
            if self.found_inf.item():
                return
        torch.nn.utils.clip_grad_norm_([self.master], MAX_NORM)
        self.optimizer.step()
        with torch.no_grad():
            self.model.copy_(self.master)


def ours_mixed(numel: int, *, scaled: bool, moments: str) -> tuple[Callable[[], object], Tensor]:
    weight, gradient = values(numel)
    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient * LOSS_SCALE if scaled else gradient
    optimizer = AdamW([parameter], lr=LR, moments=moments)
    if scaled:
        scaler = LossScaler(init_scale=LOSS_SCALE, growth_interval=10**9)
        scaler.scale(torch.ones(()))

        def run() -> None:
            scaler.step(optimizer, max_grad_norm=MAX_NORM)
            scaler.update()

    else:

        def run() -> None:
            total = optimizer.sum_of_squares()
            optimizer.step_scaled(grad_scale=clip_scale(total, MAX_NORM), skip=~total.isfinite())

    return run, parameter


def whole_steps(numel: int, *, scaled: bool) -> list[Case]:
    workload = "whole bf16 step" + (" with loss scaling" if scaled else "")
    theirs = TorchMixed(numel, scaled=scaled)
    cases = [Case(workload, "torch's passes", theirs, 20.0, theirs.model, 0.0)]
    for moments, stored, tolerance in (("fp32", 14.0, 2**-7), ("bf16", 10.0, 2**-7), ("int8", 8.03, 2**-6)):
        run, parameter = ours_mixed(numel, scaled=scaled, moments=moments)
        cases.append(Case(workload, f"mlsys split, {moments} moments", run, stored, parameter, tolerance))
    return cases


def plain_steps(numel: int) -> list[Case]:
    def case(system: str, stored: float, tolerance: float, dtype: torch.dtype, **options: object) -> Case:
        weight, gradient = values(numel)
        parameter = torch.nn.Parameter(weight.to(dtype))
        parameter.grad = gradient.to(dtype)
        kind = torch.optim.AdamW if "fused" in options else AdamW
        optimizer = kind([parameter], lr=LR, **options)
        return Case("step alone", system, optimizer.step, stored, parameter, tolerance)

    narrow = torch.bfloat16
    return [
        case("torch fused fp32", 16.0, 0.0, torch.float32, fused=True),
        case("mlsys fp32", 16.0, 2**-20, torch.float32),
        case("mlsys bf16 split, fp32 moments", 14.0, 2**-8, narrow),
        case("mlsys bf16 split, bf16 moments", 10.0, 2**-8, narrow, moments="bf16"),
        case("mlsys bf16 split, int8 moments", 8.03, 2**-6, narrow, moments="int8"),
        case("mlsys bf16 no master, int8 moments", 6.03, 2**-5, narrow, moments="int8", master=None),
    ]


def measure(cases: list[Case], rounds: int, threads: int) -> list[Result]:
    runs = [case.run for case in cases]
    take_turns(runs, 1)  # makes the state
    times = take_turns(runs, rounds)
    check(cases, rounds + 1)
    return [
        Result(
            case.workload,
            case.system,
            threads,
            min(samples) * 1e3,
            statistics.median(samples) * 1e3,
            case.bytes_stored,
            min(times[0]) / min(samples),
        )
        for case, samples in zip(cases, times, strict=True)
    ]


def check(cases: list[Case], steps: int) -> None:
    """Fails unless parameters agree: to the tolerance of what they are stored in, and of what was moved."""
    peer = cases[0].parameter.detach().float()
    for case in cases[1:]:
        apart = (case.parameter.detach().float() - peer).abs()
        if not bool((apart <= case.tolerance * (2 * peer.abs() + 8 * steps * LR)).all()):
            sys.exit(f"{case.workload}: {case.system} ended apart: the timing means nothing.")


COLUMNS = ("workload", "threads", "system", "best ms", "median ms", "bytes stored", "x the first")


def cells(result: Result) -> list[str]:
    """The result's row under COLUMNS."""
    return [
        result.workload,
        str(result.threads),
        result.system,
        f"{result.best_ms:.2f}",
        f"{result.median_ms:.2f}",
        f"{result.bytes_stored:.2f}",
        f"{result.speedup:.2f}",
    ]


def main() -> None:
    parser = options_of(__doc__, threads=(1, 2), rounds=9)
    parser.add_argument("--numel", type=int, default=50_000_000)
    options = parser.parse_args()
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for make in (
            lambda: whole_steps(options.numel, scaled=False),
            lambda: whole_steps(options.numel, scaled=True),
            lambda: plain_steps(options.numel),
        ):
            results += measure(make(), options.rounds, threads)
    show("AdamW in every stored form, minimum of interleaved rounds", COLUMNS, map(cells, results))
    write_results(options.json, rounds=options.rounds, results=results)


if __name__ == "__main__":
    main()
