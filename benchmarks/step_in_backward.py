"""Stepping inside the backward against an ordinary step, and against torch's recipe, interleaved in one run.

    python benchmarks/step_in_backward.py [--json FILE] [--threads 1] [--rounds 7]

    ordinary     backward(), mls.optim.AdamW's step(), zero_grad()
    in backward  mls.optim.step_in_backward, also with clipping by the previous norm
    torch recipe one torch.optim.AdamW(fused=True) a parameter, stepped by its post-accumulate-grad hook

Each round times one forward and backward with its step of every system; the minimum over rounds is reported.
The gradients alive at once are counted from hooks, in MiB. All systems but the clipped one must end with the
same weights (torch's within rounding), or the run fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from interleaved import options_of, show, take_turns, write_results
from torch import nn

from mlsys_engine.optim import AdamW, step_in_backward

LR = 1e-5
# layers, width, batch
WORKLOADS = {"1000 tensors of 32 x 32": (1000, 32, 4), "24 tensors of 1024 x 1024": (24, 1024, 16)}


@dataclass(frozen=True)
class Result:
    """One system's best iteration: `us_per_parameter` is what it takes beyond `ordinary`."""

    workload: str
    system: str
    threads: int
    best_ms: float
    us_per_parameter: float
    peak_gradient_mib: float


class Layers(nn.Module):
    """Square weights, one after another."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(width, width) / width**0.5 for _ in range(num_layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


class LiveGradients:
    """Counts the bytes of gradients alive whenever one has come, before anybody else's hook."""

    def __init__(self, net: nn.Module) -> None:
        self.most_bytes = 0
        self._params = list(net.parameters())
        self._hooks = [p.register_post_accumulate_grad_hook(self._look) for p in self._params]

    def _look(self, _: torch.Tensor) -> None:
        alive = sum(p.grad.nbytes for p in self._params if p.grad is not None)
        self.most_bytes = max(self.most_bytes, alive)

    def remove(self) -> None:
        """Ends counting, which takes time."""
        for hook in self._hooks:
            hook.remove()


def ordinary(net: nn.Module) -> Callable[[], object]:
    optimizer = AdamW(net.parameters(), lr=LR)

    def after() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return after


def inside(net: nn.Module, max_grad_norm: float | None = None) -> Callable[[], object]:
    step_in_backward(AdamW(net.parameters(), lr=LR), max_grad_norm=max_grad_norm)
    return lambda: None


def torch_recipe(net: nn.Module) -> Callable[[], object]:
    optimizers = {p: torch.optim.AdamW([p], lr=LR, fused=True) for p in net.parameters()}

    def hook(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(hook)
    return lambda: None


SYSTEMS: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "ordinary": ordinary,
    "in backward": inside,
    "in backward, clipped": lambda net: inside(net, max_grad_norm=1.0),
    "torch recipe": torch_recipe,
}


def iterate(net: nn.Module, x: torch.Tensor, after: Callable[[], object]) -> None:
    net(x).square().mean().backward()
    after()


def measure(workload: str, threads: int, rounds: int) -> list[Result]:
    num_layers, width, batch = WORKLOADS[workload]
    x = torch.randn(batch, width, generator=torch.Generator().manual_seed(1))
    nets = {name: Layers(num_layers, width) for name in SYSTEMS}
    peaks = {name: LiveGradients(net) for name, net in nets.items()}
    after = {name: build(nets[name]) for name, build in SYSTEMS.items()}
    iterations = [functools.partial(iterate, net, x, after[name]) for name, net in nets.items()]
    take_turns(iterations, 2)  # to warm up; the first clipped backward only measures
    for peak in peaks.values():
        peak.remove()
    times = dict(zip(nets, take_turns(iterations, rounds), strict=True))
    check(nets)
    num_params = len(list(nets["ordinary"].parameters()))
    base = min(times["ordinary"])
    return [
        Result(
            workload=workload,
            system=name,
            threads=threads,
            best_ms=min(taken) * 1e3,
            us_per_parameter=(min(taken) - base) / num_params * 1e6,
            peak_gradient_mib=peaks[name].most_bytes / 2**20,
        )
        for name, taken in times.items()
    ]


def check(nets: dict[str, nn.Module]) -> None:
    """Fails when a system has computed something else."""
    expected = list(nets["ordinary"].parameters())
    for mine, other in zip(nets["in backward"].parameters(), expected, strict=True):
        if not torch.equal(mine, other):
            raise SystemExit("in backward: other bits than ordinary steps")
    for mine, other in zip(nets["torch recipe"].parameters(), expected, strict=True):
        # An update is at most a few lr; torch rounds it otherwise, and normalising may turn a tiny gradient.
        if (mine - other).abs().max() > 100 * LR:
            raise SystemExit("torch recipe: other weights than ordinary steps")


COLUMNS = ("workload", "system", "threads", "ms", "us a parameter beyond ordinary", "gradients, MiB")


def cells(result: Result) -> list[str]:
    """The result's row under COLUMNS."""
    return [
        result.workload,
        result.system,
        str(result.threads),
        f"{result.best_ms:.2f}",
        f"{result.us_per_parameter:+.1f}",
        f"{result.peak_gradient_mib:.2f}",
    ]


def main() -> None:
    options = options_of(__doc__, threads=(1,), rounds=7).parse_args()
    results: list[Result] = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for workload in WORKLOADS:
            results += measure(workload, threads, options.rounds)
    show("Step in backward, minimum of interleaved rounds", COLUMNS, map(cells, results))
    write_results(options.json, rounds=options.rounds, results=results)


if __name__ == "__main__":
    main()
