"""Time and memory of a step under a budget of activations, against the ways to checkpoint by hand.

    python benchmarks/activation.py [--json FILE] [--threads 2] [--rounds 7] [--models gpt resnet]

For each budget: the engine's plan, the plan that may pack to int8, and torch's checkpoint on the fewest
first blocks that need no more memory than the first of these. Besides: everything kept, every block
checkpointed, and the selective policies; torch's keeps the results of matrix products, convolutions and
attention.

Two peaks: of the bytes saved for the backward, by the engine's meter (what a budget is about; it does not see
what torch's checkpoint keeps in its caches), and of all that torch's allocator gave out during the step, by
its profiler, with gradients and temporaries, on the same basis for every system. Systems take turns in one
process, and gradients of lossless systems are compared with the plain model's, bit for bit.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from interleaved import options_of, show, take_turns, write_results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mlsys_engine import activation, models
from mlsys_engine.activation.measure import scalar
from mlsys_engine.memory import SavedActivationMeter

INT8 = "int8"
BUDGETS = (0.9, 0.7, 0.5, 0.3)
COLUMNS = (
    *("workload", "threads", "system", "saved of plain", "allocated of plain"),
    *("best ms", "median ms", "of the plain time"),
)
Case = tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Any]]


@dataclass(frozen=True)
class Result:
    """One system on one model; peaks are measured."""

    workload: str
    system: str
    threads: int
    peak_bytes: int  # of saved tensors
    allocated_bytes: int  # the most that the step's allocations took at a time
    best_ms: float
    median_ms: float
    peak_of_plain: float
    allocated_of_plain: float
    time_of_plain: float


class Bottleneck(nn.Module):
    """ResNet's, He et al. 2015."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        sizes = ((width, inner, 1), (inner, inner, 3), (inner, width, 1))
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, padding=k // 2, bias=False) for i, o, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            y = norm(convolution(y))
            y = self.relu(y) if i < 2 else y
        return self.relu(y + x)


def gpt() -> Case:
    config = models.GPTConfig(num_layers=12, width=256, num_heads=8, context_length=256)
    return models.GPT(config), torch.randint(0, 256, (4, 256)), lambda model, x: model(x, labels=x)


def resnet() -> Case:
    """Sixteen bottlenecks in four stages, as ResNet-50 has them, for small images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1)]
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        layers.append(nn.Sequential(*(Bottleneck(width, width // 4) for _ in range(depth))))
        if stage < 3:
            layers.append(nn.Conv2d(width, 2 * width, 1, stride=2))
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(8, 3, 32, 32), lambda model, x: model(x)


CASES = {"gpt": gpt, "resnet": resnet}


def by_torch(model: nn.Module, names: Iterable[str], **options: Any) -> nn.Module:
    """The model with torch's checkpoint around the named blocks."""
    for name in names:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return model


def keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = ("mm", "addmm", "bmm", "convolution", "_scaled_dot_product")
    is_kept = any(op.name().removeprefix("aten::").startswith(name) for name in kept)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def systems_of(case: Case) -> dict[str, nn.Module]:
    model, sample, call = case
    names = list(activation.resolve(model, "full"))
    selective = partial(create_selective_checkpoint_contexts, keep_products)
    systems = {
        "everything kept": model,
        "torch, every block": by_torch(copy.deepcopy(model), names),
        "torch, selective": by_torch(copy.deepcopy(model), names, context_fn=selective),
        "mlsys, every block": activation.checkpoint(copy.deepcopy(model), policy="full"),
        "mlsys, selective": activation.checkpoint(copy.deepcopy(model), policy="selective"),
        f"mlsys, selective {INT8}": activation.checkpoint(
            copy.deepcopy(model), policy="selective", lossy=INT8
        ),
    }
    for budget in BUDGETS:
        plan = activation.plan(model, sample, budget, call=call, repeats=3)
        planned = systems[f"mlsys, budget {budget:.0%}"] = plan.apply(copy.deepcopy(model))
        plan = activation.plan(model, sample, budget, call=call, repeats=3, lossy=INT8)
        systems[f"mlsys, budget {budget:.0%} {INT8}"] = plan.apply(copy.deepcopy(model))
        first = first_blocks(case, names, allocated_by(planned, sample, call))
        if first is not None:
            systems[f"torch, first {first} blocks ({budget:.0%})"] = by_torch(
                copy.deepcopy(model), names[:first]
            )
    return systems


def first_blocks(case: Case, names: list[str], allocated_bytes: int) -> int | None:
    """How many first blocks must be run again to allocate no more; None when all are not enough."""
    model, sample, call = case
    for count in range(1, len(names) + 1):
        if allocated_by(by_torch(copy.deepcopy(model), names[:count]), sample, call) <= allocated_bytes:
            return count
    return None


def allocated_by(model: nn.Module, sample: Tensor, call: Callable[..., Any]) -> int:
    """The most bytes that a step's allocations take at a time, as torch's profiler is told of them."""
    step(model, sample, call)  # what is made in the first step, and gradients
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(model, sample, call)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def peak_of(model: nn.Module, sample: Tensor, call: Callable[..., Any]) -> int:
    with SavedActivationMeter(model) as meter:
        step(model, sample, call)
    return meter.peak_bytes


def step(model: nn.Module, sample: Tensor, call: Callable[..., Any]) -> None:
    model.zero_grad()
    scalar(call(model, sample)).backward()


def measure(workload: str, threads: int, rounds: int) -> list[Result]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = CASES[workload]()
    _, sample, call = case
    systems = systems_of(case)
    peaks = [peak_of(model, sample, call) for model in systems.values()]
    allocated = [allocated_by(model, sample, call) for model in systems.values()]
    check_gradients(systems, sample, call)
    times = take_turns([partial(step, model, sample, call) for model in systems.values()], rounds)
    plain = times[0]
    return [
        Result(
            workload=workload,
            system=system,
            threads=threads,
            peak_bytes=peak,
            allocated_bytes=taken_bytes,
            best_ms=min(taken) * 1e3,
            median_ms=statistics.median(taken) * 1e3,
            peak_of_plain=peak / peaks[0],
            allocated_of_plain=taken_bytes / allocated[0],
            time_of_plain=statistics.median(t / p for t, p in zip(taken, plain, strict=True)),
        )
        for system, peak, taken_bytes, taken in zip(systems, peaks, allocated, times, strict=True)
    ]


def check_gradients(systems: dict[str, nn.Module], sample: Tensor, call: Callable[..., Any]) -> None:
    expected: list[Tensor | None] = []
    for system, model in systems.items():
        if INT8 in system:
            continue
        step(model, sample, call)
        found = [parameter.grad for parameter in model.parameters()]
        expected = expected or found
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other), f"{system} has other gradients"  # type: ignore[arg-type]


def rows(results: list[Result]) -> list[list[str]]:
    return [
        [
            r.workload,
            str(r.threads),
            r.system,
            f"{r.peak_of_plain:.2f}",
            f"{r.allocated_of_plain:.2f}",
            f"{r.best_ms:.1f}",
            f"{r.median_ms:.1f}",
            f"{r.time_of_plain:.3f}",
        ]
        for r in results
    ]


def main() -> None:
    parser = options_of(__doc__ or "", threads=(2,), rounds=7)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    results = [
        result
        for threads in options.threads
        for workload in options.models
        for result in measure(workload, threads, options.rounds)
    ]
    show("A step under a budget of activations", COLUMNS, rows(results))
    write_results(options.json, rounds=options.rounds, results=[asdict(result) for result in results])


if __name__ == "__main__":
    main()
