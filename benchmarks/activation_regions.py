"""What a checkpointed region costs besides running its block a second time.

    python benchmarks/activation_regions.py [--json FILE] [--threads 1 2] [--rounds 300]

Blocks so small that a step is all overhead, one region each. A region's cost is the checkpointed step less
the plain step and a plain forward, divided by the blocks. Systems take turns in one process; gradients are
compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from interleaved import options_of, show, take_turns, write_results
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from mlsys_engine import activation

NUM_BLOCKS = 32
WIDTH = 8
COLUMNS = ("system", "threads", "best us", "median us")
Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """Microseconds of one system's region, besides the second forward."""

    system: str
    threads: int
    best_us: float
    median_us: float


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gelu, self.down = nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.gelu(self.up(x)))


class Stack(nn.Module):
    """Blocks in a row, each called through `run`."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.run(block, x)
        return x.sum()


def plainly(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return block(x)


def by_torch(block: nn.Module, x: torch.Tensor, preserve_rng_state: bool) -> torch.Tensor:
    return torch_checkpoint(block, x, use_reentrant=False, preserve_rng_state=preserve_rng_state)


def make_models() -> dict[str, nn.Module]:
    """Models with the same weights, by system."""
    runs = {
        "plain": plainly,
        "torch": partial(by_torch, preserve_rng_state=True),
        "torch without random state": partial(by_torch, preserve_rng_state=False),
        "mlsys": plainly,
    }
    made = {system: Stack(run) for system, run in runs.items()}
    for model in made.values():
        model.load_state_dict(made["plain"].state_dict())
    activation.checkpoint(made["mlsys"], policy="full")
    return made


def measure(threads: int, rounds: int) -> list[Result]:
    torch.set_num_threads(threads)
    models, x = make_models(), torch.randn(4, WIDTH, requires_grad=True)
    steps: list[Callable[[], object]] = [partial(step, model, x) for model in models.values()]
    times = take_turns([*steps, partial(models["plain"], x)], rounds)
    check_gradients(models, x)
    forward, plain = times[-1], times[0]
    return [
        Result(
            system=system,
            threads=threads,
            best_us=per_region_us(min(taken) - min(plain) - min(forward)),
            median_us=per_region_us(
                statistics.median(t - p - f for t, p, f in zip(taken, plain, forward, strict=True))
            ),
        )
        for system, taken in zip(models, times, strict=False)
        if system != "plain"
    ]


def step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).backward()


def per_region_us(seconds: float) -> float:
    return seconds / NUM_BLOCKS * 1e6


def check_gradients(models: dict[str, nn.Module], x: torch.Tensor) -> None:
    """Every system's gradients equal the plain model's, bit for bit."""
    found = []
    for model in models.values():
        model.zero_grad()
        step(model, x)
        found.append([parameter.grad for parameter in model.parameters()])
    for gradients in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], gradients, strict=True))


def rows(results: Sequence[Result]) -> list[list[str]]:
    return [[r.system, str(r.threads), f"{r.best_us:.1f}", f"{r.median_us:.1f}"] for r in results]


def main() -> None:
    options = options_of(__doc__ or "", threads=(1, 2), rounds=300).parse_args()
    results = [result for threads in options.threads for result in measure(threads, options.rounds)]
    show("A checkpointed region besides its second forward", COLUMNS, rows(results))
    write_results(options.json, rounds=options.rounds, results=[asdict(result) for result in results])


if __name__ == "__main__":
    main()
