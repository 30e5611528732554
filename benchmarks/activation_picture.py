"""The Pareto picture of activation checkpointing: peak memory against the time of a step, a line a system.

    python benchmarks/activation.py --json RESULTS.json
    python benchmarks/activation_picture.py RESULTS.json OUT.svg

Both axes are parts of the plain model's, so nearer to the lower left is better. Systems with a budget or a
number of blocks are lines through their results; others are points. One chart for each model, number of
threads and measure of memory that the results have, one below the other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlsys_engine.tracking.line_chart import HEIGHT, WIDTH, Level, Series, line_chart

MEASURES = {"peak_of_plain": "bytes saved for the backward", "allocated_of_plain": "bytes allocated"}
OURS = ("#1b62a8", "#c8401f", "#2e8b57", "#7b4ea3", "#0e8f9e", "#b0417a")
OTHERS = ("#222222", "#8a8a8a", "#b58a2c", "#8b6b5c", "#5f7f5f")
_SETTING = re.compile(r"\s*\(?\b\d+%\)?|\s+\d+(?= blocks)")  # a budget, or a number of blocks


def family(system: str) -> str:
    """The system without its setting: "torch, first blocks" of "torch, first 3 blocks (50%)"."""
    return _SETTING.sub("", system)


def picture(record: Mapping[str, Any]) -> str:
    """The SVG of a record that benchmarks/activation.py wrote."""
    results = record["results"]
    cases = dict.fromkeys((result["workload"], result["threads"]) for result in results)
    charts = [
        _chart([r for r in results if (r["workload"], r["threads"]) == case], case, measure)
        for case in cases
        for measure in MEASURES
        if all(measure in result for result in results)
    ]
    height = HEIGHT * len(charts)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}">',
            *(f'<g transform="translate(0 {HEIGHT * place})">\n{c}</g>' for place, c in enumerate(charts)),
            "</svg>\n",
        ]
    )


def _chart(results: Sequence[Mapping[str, Any]], case: tuple[str, int], measure: str) -> str:
    points: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        points.setdefault(family(result["system"]), []).append((result["time_of_plain"], result[measure]))
    ours, others = itertools.cycle(OURS), itertools.cycle(OTHERS)
    workload, threads = case
    return line_chart(
        title=f"{workload}, {threads} thread{'s' * (threads != 1)}: {MEASURES[measure]}",
        x_label="time of a step, of the plain model's",
        y_label="peak, of the plain model's",
        series=[
            Series(
                label=system,
                # By memory, so that a line goes through the budgets in their order.
                points=sorted(found, key=lambda point: point[1]),
                color=next(ours if system.startswith("mlsys") else others),
                marked=True,
            )
            for system, found in points.items()
        ],
        levels=[Level(label="the plain peak", y=1.0)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what benchmarks/activation.py --json wrote")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    options = parser.parse_args()
    options.picture.write_text(picture(json.loads(options.results.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
