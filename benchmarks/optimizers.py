"""Our AdamW against torch's fused AdamW and against the memory's own speed, interleaved in one run.

    python benchmarks/optimizers.py [--json FILE] [--threads 1 2] [--numel N] [--rounds N]

Each round times every system once, in turn; the minimum over rounds is reported, with the median beside it.
All systems take the same steps on the same numbers, and the run fails when their parameters end apart. The
ceiling is a kernel built beside ours that reads four arrays and writes three with three additions an element.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from interleaved import options_of, show, take_turns, write_results

from mlsys_engine.memory.flat_arena import FlatArena, layout_slots
from mlsys_engine.optim import AdamW, clip_scale
from mlsys_engine.optim.kernels import HYPER_COLUMNS, SEGMENT_COLUMNS, operators
from mlsys_engine.optim.segments import FIRST_STATE_COLUMN, GRAD_COLUMN, PARAM_COLUMN, fill_lengths

ADAMW_BYTES = 28  # 4 reads and 3 writes of fp32
NORM_BYTES = 4
EPSILON = 2.0**-24


@dataclass
class Case:
    """One timed system of one workload."""

    workload: str
    system: str
    run: Callable[[], object]
    num_bytes: int
    params: list[torch.nn.Parameter]


@dataclass(frozen=True)
class Result:
    """Times of one system; `speedup` is torch's minimum over its, `of_ceiling` the probe's over its."""

    workload: str
    system: str
    threads: int
    best_ms: float
    median_ms: float
    gigabytes_per_second: float
    speedup: float | None
    of_ceiling: float | None


def loose_parameters(num_tensors: int, numel: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(numel, generator=generator)) for _ in range(num_tensors)]
    for parameter in params:
        magnitude = torch.rand(numel, generator=generator) * 1.5 + 0.5
        parameter.grad = magnitude * torch.randint(0, 2, (numel,), generator=generator).mul_(2).sub_(1)
    return params


def arena_optimizer(num_tensors: int, numel: int) -> tuple[list[torch.nn.Parameter], AdamW]:
    source = loose_parameters(num_tensors, numel)
    slots = layout_slots([(str(index), (numel,)) for index in range(num_tensors)], torch.float32)
    data, grads = FlatArena.build(slots, torch.float32), FlatArena.build(slots, torch.float32)
    for slot, parameter in zip(slots, source, strict=True):
        assert parameter.grad is not None
        data.view(slot).copy_(parameter.detach())
        grads.view(slot).copy_(parameter.grad)
        parameter.data, parameter.grad = data.view(slot), grads.view(slot)
    optimizer = AdamW(source)
    optimizer.adopt(data, grads)
    return source, optimizer


def clipped(optimizer: AdamW) -> None:
    total = optimizer.sum_of_squares()
    optimizer.step_scaled(grad_scale=clip_scale(total, 1.0), skip=not bool(total.isfinite()))


def torch_clipped(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> None:
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()


def probe(numel: int) -> Callable[[], object]:
    arrays = [torch.zeros(numel) for _ in range(4)]
    table = torch.zeros(1, SEGMENT_COLUMNS, dtype=torch.int64)
    for column, array in zip(
        (PARAM_COLUMN, GRAD_COLUMN, FIRST_STATE_COLUMN, FIRST_STATE_COLUMN + 1), arrays, strict=True
    ):
        table[0, column] = array.data_ptr()
    fill_lengths(table, [numel], [0], [0])
    hyper, steps = torch.zeros(1, HYPER_COLUMNS, dtype=torch.float64), torch.ones(1)

    def run() -> object:
        assert arrays  # keeps the memory behind the table alive
        return operators().stream_probe_step(table, hyper, steps, 1.0)

    return run


def step_cases(num_tensors: int, numel: int, *, clip: bool) -> list[Case]:
    """Ours on loose parameters and in an arena, torch fused, and without clipping the ceiling."""
    count = num_tensors * numel
    workload = f"{num_tensors:,} x {numel:,}" + (" + clip" if clip else "")
    num_bytes = count * (ADAMW_BYTES + (NORM_BYTES if clip else 0))
    loose, theirs = loose_parameters(num_tensors, numel), loose_parameters(num_tensors, numel)
    ours, peer = AdamW(loose), torch.optim.AdamW(theirs, fused=True)
    cases = [
        Case(
            workload,
            "torch fused",
            (lambda: torch_clipped(peer, theirs)) if clip else peer.step,
            num_bytes,
            theirs,
        ),
        Case(workload, "mlsys loose", (lambda: clipped(ours)) if clip else ours.step, num_bytes, loose),
    ]
    if num_tensors > 1:
        in_arena, optimizer = arena_optimizer(num_tensors, numel)
        run = (lambda: clipped(optimizer)) if clip else optimizer.step
        cases.append(Case(workload, "mlsys arena", run, num_bytes, in_arena))
    if not clip:
        cases.append(Case(workload, "ceiling", probe(count), count * ADAMW_BYTES, []))
    return cases


def measure(cases: list[Case], rounds: int, threads: int) -> list[Result]:
    times = take_turns([case.run for case in cases], rounds)
    check(cases, rounds)
    best = {case.system: min(samples) for case, samples in zip(cases, times, strict=True)}
    results = []
    for case, samples in zip(cases, times, strict=True):
        own = min(samples)
        ceiling = best.get("ceiling")
        results.append(
            Result(
                case.workload,
                case.system,
                threads,
                own * 1e3,
                statistics.median(samples) * 1e3,
                case.num_bytes / own / 1e9,
                best["torch fused"] / own if case.system != "ceiling" else None,
                ceiling / own if ceiling else None,
            )
        )
    return results


def check(cases: list[Case], steps: int) -> None:
    """Fails unless all systems ended with the same parameters, to rounding.

    The gradients have one magnitude within a factor of 4, so an update is at most 2 lr = 2e-3 and is rounded
    a few dozen times a step. torch clips what it has already clipped, by another 1e-6 a step, and sums the
    norm in fp32: the ratio of the moments, and with it the update, moves by at most steps * 1e-6.
    """
    peer = cases[0]
    for case in cases[1:]:
        for ours, theirs in zip(case.params, peer.params, strict=bool(case.params)):
            bound = steps * (EPSILON * (4 * theirs.detach().abs() + 40 * 2e-3) + 2e-3 * steps * 1e-6)
            if not bool(((ours - theirs).abs() <= bound).all()):
                sys.exit(
                    f"{case.workload}: {case.system} and {peer.system} ended apart: the timing means nothing."
                )


COLUMNS = ("workload", "threads", "system", "best ms", "median ms", "GB/s", "x torch fused", "of ceiling")


def cells(result: Result) -> list[str]:
    """The result's row under COLUMNS."""
    return [
        result.workload,
        str(result.threads),
        result.system,
        f"{result.best_ms:.2f}",
        f"{result.median_ms:.2f}",
        f"{result.gigabytes_per_second:.1f}",
        f"{result.speedup:.2f}" if result.speedup else "",
        f"{result.of_ceiling:.2f}" if result.of_ceiling else "",
    ]


def main() -> None:
    parser = options_of(__doc__, threads=(1, 2), rounds=15)
    parser.add_argument("--numel", type=int, default=50_000_000, help="elements of the one large tensor")
    parser.add_argument("--tensors", type=int, default=5000, help="number of small tensors")
    parser.add_argument("--tensor-numel", type=int, default=1000, help="elements of a small tensor")
    options = parser.parse_args()
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for num_tensors, numel in ((1, options.numel), (options.tensors, options.tensor_numel)):
            for clip in (False, True):
                results += measure(step_cases(num_tensors, numel, clip=clip), options.rounds, threads)
    show("AdamW step, fp32, minimum of interleaved rounds", COLUMNS, map(cells, results))
    write_results(options.json, rounds=options.rounds, results=results)


if __name__ == "__main__":
    main()
