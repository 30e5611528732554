"""What the benchmarks of one process share: systems that take turns, their options, table and record.

Each round times every system once, in turn, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from contest import machine, write_record
from rich.console import Console
from rich.table import Table

from mlsys_engine.optim.kernels import operators

TEXT = {"workload", "system", "rule", "task", "form"}  # columns of words; the others are numbers


def take_turns(systems: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """The seconds of each system in each round."""
    times: list[list[float]] = [[] for _ in systems]
    for _ in range(rounds):
        for system, samples in zip(systems, times, strict=True):
            begin = time.perf_counter()
            system()
            samples.append(time.perf_counter() - begin)
    return times


def options_of(description: str, *, threads: Sequence[int], rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that every such benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--threads", type=int, nargs="+", default=list(threads))
    parser.add_argument("--rounds", type=int, default=rounds)
    return parser


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table, under a title that names the machine."""
    table = Table(title=f"{title}\n{machine()}, {operators().simd_level()}")
    for column in columns:
        table.add_column(column, justify="left" if column in TEXT else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=max(120, Console().width)).print(table)


def write_results(path: Path | None, **parts: Any) -> None:
    """Writes the results as JSON where that was asked for, with what they were measured on."""
    if path is not None:
        write_record(path, simd=operators().simd_level(), **parts)
