"""A self-test of a few seconds: two local ranks reduce a tensor and take an optimizer step, both checked.

Run as `python -m mlsys_engine.cli.selftest RESULT_FILE` by each rank; rank 0 writes the result.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlsys_engine import optim
from mlsys_engine.comm.launch import World, init, launch_local

RANKS = 2
TIMEOUT_S = 60.0
_NUM_ELEMENTS = 1 << 18
# AdamW computes a handful of float32 operations an element, in another order than torch's; each rounds by at
# most 2^-24 relative to values of order 1, and one step with lr 0.1 keeps them there.
_OPTIMIZER_TOLERANCE = 1e-6


def run_on_two_ranks() -> dict[str, Any]:
    """Starts the ranks and gives their result; `passed` is false with a `cause` when anything went wrong."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mlsys-selftest-") as folder:
        result_file = Path(folder) / "result.json"
        status = launch_local(["-m", "mlsys_engine.cli.selftest", str(result_file)], RANKS)
        seconds = time.perf_counter() - started
        if status != 0 or not result_file.exists():
            cause = f"the ranks ended with status {status}; what they wrote is above"
            return {"passed": False, "cause": cause, "seconds": seconds}
        result: dict[str, Any] = json.loads(result_file.read_text())
    return {**result, "seconds": seconds}


def run_rank(world: World) -> dict[str, Any]:
    """One rank's part: called on every rank of the world."""
    values = torch.arange(_NUM_ELEMENTS, dtype=torch.float32) + world.rank
    dist.all_reduce(values)
    # Sums of whole numbers below 2^24 are exact in float32, whatever their order.
    sum_of_ranks = world.world_size * (world.world_size - 1) // 2
    expected = torch.arange(_NUM_ELEMENTS, dtype=torch.float32) * world.world_size + sum_of_ranks
    all_reduce_exact = bool(torch.equal(values, expected))
    error = _optimizer_error()
    causes = []
    if not all_reduce_exact:
        wrong = int((values != expected).sum())
        causes.append(f"the all-reduce gave {wrong} wrong sums of {_NUM_ELEMENTS}")
    if not error <= _OPTIMIZER_TOLERANCE:
        causes.append(f"an AdamW step differs from torch's by {error}")
    return {
        "passed": not causes,
        "cause": "; ".join(causes),
        "ranks": world.world_size,
        "backend": world.backend,
        "all_reduce_bytes": values.numel() * values.element_size(),
        "optimizer_error": error,
    }


def _optimizer_error() -> float:
    """The largest difference between our AdamW step and torch's, on equal parameters and gradients."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4099, generator=generator)
    gradient = torch.randn(4099, generator=generator)
    results = []
    for optimizer_type in (optim.AdamW, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        parameter.grad = gradient.clone()
        optimizer_type([parameter], lr=0.1, weight_decay=0.1).step()
        results.append(parameter.detach())
    return float((results[0] - results[1]).abs().max())


def _main() -> None:
    world = init(timeout_s=TIMEOUT_S)
    result = run_rank(world)
    results: list[Any] = [None] * world.world_size
    dist.all_gather_object(results, result)
    if world.rank == 0:
        failed = [one for one in results if not one["passed"]]
        Path(sys.argv[1]).write_text(json.dumps(failed[0] if failed else result))


if __name__ == "__main__":
    _main()
