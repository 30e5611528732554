"""The picture of a run: training loss, validation points and baselines in one unit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlsys_engine.tracking import json_files
from mlsys_engine.tracking.line_chart import Level, Point, Series, line_chart

BITS = "bits_per_byte"
_RAW, _SMOOTH, _VALIDATION = "#b5d0ea", "#1b62a8", "#c8401f"
_SMOOTH_FROM = 40  # points; below, the raw curve is readable as it is


@dataclass(frozen=True, kw_only=True)
class LossCurves:
    """The curves of one run in the unit `unit` ("bits per byte", or "loss" for the loss as it was logged)."""

    unit: str
    train: tuple[Point, ...]
    validation: tuple[Point, ...]
    levels: Mapping[str, float]


def loss_curves(fields: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> LossCurves:
    """The curves of a run record (run.json's fields and the metrics rows).

    The unit is bits per byte when a token is a byte (`manifest.data.unit` is "byte"), or when a row has the
    validation loss in both units, which tells how they convert; otherwise it is the loss as logged. Baselines
    of another unit are left out: a line at the wrong height would mislead.
    """
    factor = _bits_per_nat(fields, rows)
    unit = "loss" if factor is None else BITS
    scale = 1.0 if factor is None else factor
    train = [(row["step"], row["loss"] * scale) for row in rows if "loss" in row]
    validation = [(row["step"], row["val_loss"] * scale) for row in rows if "val_loss" in row]
    if factor is not None:
        direct = [(row["step"], row[f"val_{BITS}"]) for row in rows if f"val_{BITS}" in row]
        validation = direct or validation
    return LossCurves(
        unit=unit.replace("_", " "),
        train=tuple(train),
        validation=tuple(validation),
        levels=_levels(fields.get("baselines") or {}, unit),
    )


def loss_picture(fields: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> str:
    """The SVG text of a run's loss."""
    curves = loss_curves(fields, rows)
    if len(curves.train) >= _SMOOTH_FROM:
        train = [
            Series(label="training, each step", points=curves.train, color=_RAW, width=1.2),
            Series(label="training, smoothed", points=smooth(curves.train), color=_SMOOTH),
        ]
    else:
        train = [Series(label="training", points=curves.train, color=_SMOOTH)]
    validation = Series(label="validation", points=curves.validation, color=_VALIDATION, marked=True)
    world_size, backend = fields.get("world_size"), fields.get("backend")
    return line_chart(
        title=f"Loss of run {fields.get('id', '?')}",
        x_label="optimizer step",
        y_label=curves.unit,
        series=[*train, *([validation] if curves.validation else [])],
        levels=[Level(label=name, y=value) for name, value in curves.levels.items()],
        note=f"{world_size} rank{'s' * (world_size != 1)} on {backend}" if world_size else "",
    )


def smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over a centred window of about a thirtieth of the curve, of the finite values only.

    At the start the window shrinks on both sides alike, so that the mean does not lag behind the first fall.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    sums = [0.0, *itertools.accumulate(y for _, y in finite)]
    reach, last = max(1, len(finite) // 60), len(finite) - 1
    smoothed = []
    for index, (x, _) in enumerate(finite):
        before = min(reach, index)
        after = min(before, last - index)
        smoothed.append((x, (sums[index + after + 1] - sums[index - before]) / (before + after + 1)))
    return smoothed


def _bits_per_nat(fields: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> float | None:
    data = (fields.get("manifest") or {}).get("data") or {}
    if data.get("unit") == "byte":
        return 1.0 / math.log(2.0)
    for row in rows:
        nats, bits = row.get("val_loss"), row.get(f"val_{BITS}")
        if nats and bits and math.isfinite(nats) and math.isfinite(bits):
            return bits / nats
    return None


def _levels(baselines: Mapping[str, Any], unit: str) -> dict[str, float]:
    levels = {}
    for name, measures in baselines.items():
        value = json_files.number(measures.get(unit)) if isinstance(measures, Mapping) else None
        if value is not None and math.isfinite(value):
            levels[name] = value
    return levels
