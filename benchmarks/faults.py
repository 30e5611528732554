"""How soon survivors learn of a rank that fails: seeded failures, and the time until the last one has raised.

    python -m benchmarks.faults --trials 200 --seed 0 --json kills.json

Each trial forks 2 to 4 ranks on one host or on faked ones, and lets one of them be killed, exit, raise or be
stopped (SIGSTOP) at a random moment: before or while the group connects, in a collective (small, large, in
the arena, asynchronous, of a subgroup), between two, or while messages are under way. The latency is the last
survivor's, from the failure, or for a stopped rank from the timeout, to the exception in Python. A survivor
that names another rank, hangs or leaves something open is a complaint, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mlsys_engine.telemetry import describe_hardware
from tests.support.kills import Outcome, Trial, run_trial

BOUND_S = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="the first trial's; the others' follow it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no trial after this long")
    parser.add_argument("--json", type=Path, help="where to write all of it")
    arguments = parser.parse_args()
    outcomes: list[Outcome] = []
    begin = time.monotonic()
    for seed in range(arguments.seed, arguments.seed + arguments.trials):
        if time.monotonic() - begin > arguments.seconds:
            break
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(run_trial(Trial.draw(seed), Path(folder)))
        for complaint in outcomes[-1].complaints:
            sys.stdout.write(f"seed {seed}, {outcomes[-1].trial}: {complaint}\n")
            sys.stdout.flush()
    show(outcomes)
    if arguments.json:
        record = {
            "hardware": describe_hardware(),
            "seed": arguments.seed,
            "summary": {way: summary(latencies) for way, latencies in by_way(outcomes).items()},
            "trials": [
                {**asdict(o.trial), "latency_s": o.latency_s, "complaints": o.complaints} for o in outcomes
            ],
        }
        arguments.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    return 1 if any(outcome.complaints for outcome in outcomes) else 0


def by_way(outcomes: list[Outcome]) -> dict[str, list[float]]:
    """Latencies of the trials without complaints, by the way of failing."""
    latencies = defaultdict(list)
    for outcome in outcomes:
        if not outcome.complaints:
            latencies[outcome.trial.way].append(outcome.latency_s)
            latencies["all"].append(outcome.latency_s)
    return dict(sorted(latencies.items()))


def summary(latencies: list[float]) -> dict[str, float]:
    """Counts and milliseconds."""
    ordered = sorted(latencies)
    return {
        "trials": len(ordered),
        "median_ms": 1e3 * statistics.median(ordered),
        "p95_ms": 1e3 * ordered[int(0.95 * (len(ordered) - 1))],
        "worst_ms": 1e3 * ordered[-1],
        "within_100_ms": sum(latency <= BOUND_S for latency in ordered),
    }


def show(outcomes: list[Outcome]) -> None:
    """A table by way of failing."""
    console = Console()
    table = Table("failed by", "trials", "median", "95%", "worst", "within 100 ms")
    for way, latencies in by_way(outcomes).items():
        row = summary(latencies)
        times = [f"{row[key]:.1f} ms" for key in ("median_ms", "p95_ms", "worst_ms")]
        table.add_row(way, str(row["trials"]), *times, f"{row['within_100_ms']} of {row['trials']}")
    console.print(table)
    console.print(
        f"{sum(bool(outcome.complaints) for outcome in outcomes)} of {len(outcomes)} with complaints"
    )


if __name__ == "__main__":
    sys.exit(main())
