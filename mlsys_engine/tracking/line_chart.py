"""A line chart as SVG text, drawn without a plotting library: plain XML that any browser shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 880, 480
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 76, 52  # margins of the plotting area, in pixels
_LEGEND_LINE = 20
MAX_POINTS = 800  # a longer series keeps each bucket's lowest and highest point, so that spikes stay visible


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; `marked` draws a dot with a tooltip at each point. Without a label it has no legend."""

    label: str
    points: Sequence[Point]
    color: str
    width: float = 2.0
    marked: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A dashed horizontal line with its name at the right end."""

    label: str
    y: float


@dataclass(frozen=True)
class _Axes:
    """The range of the data and its mapping to pixels."""

    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    top: int = TOP  # of the plotting area: lower when the legend takes more than a line

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - self.top - BOTTOM)


def line_chart(
    *,
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    levels: Sequence[Level] = (),
    note: str = "",
) -> str:
    """The chart as one self-contained `<svg>`. Non-finite points leave a gap and are counted in the note."""
    finite = [point for curve in series for point in curve.points if _is_finite(point)]
    lost = sum(len(curve.points) for curve in series) - len(finite)
    xs = [x for x, _ in finite] or [0.0, 1.0]
    ys = [y for _, y in finite] + [level.y for level in levels] or [0.0, 1.0]
    legend, num_lines = _legend(series)
    top = TOP + _LEGEND_LINE * (num_lines - 1)
    axes = _Axes(ticks(min(xs), max(xs)), ticks(min(ys), max(ys)), top)
    notes = [note] if note else []
    if lost:
        notes.append(f"{lost} point{'s' * (lost > 1)} not finite")
    if not finite:
        notes.append("no points yet")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 28, title, size=17, weight="600"),
        _text(WIDTH - RIGHT, 28, "; ".join(notes), anchor="end", fill="#777777", size=12),
        *_grid(axes, x_label, y_label),
        *_levels(axes, levels),
        *(part for curve in series for part in _curve(axes, curve, x_label)),
        *legend,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def ticks(low: float, high: float, about: int = 6) -> tuple[float, ...]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each bucket of neighbours, in order."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = range(start, min(start + size, len(points)))
        lowest = min(bucket, key=lambda index: points[index][1])
        highest = max(bucket, key=lambda index: points[index][1])
        kept.extend(points[index] for index in sorted({lowest, highest}))
    return kept


def _grid(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, axes.top, HEIGHT - BOTTOM
    parts = []
    for value in axes.y_ticks:
        y = axes.y(value)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#e6e6e6"/>')
        parts.append(_text(left - 8, y + 4, _short(value), anchor="end", fill="#555555"))
    for value in axes.x_ticks:
        x = axes.x(value)
        parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#999999"/>')
        parts.append(_text(x, bottom + 20, _short(value), anchor="middle", fill="#555555"))
    parts.append(f'<path d="M{left} {bottom}H{right}" stroke="#999999"/>')
    parts.append(_text((left + right) / 2, HEIGHT - 12, x_label, anchor="middle"))
    middle = (top + bottom) / 2
    turned = f' transform="rotate(-90 18 {middle:.1f})"'
    parts.append(_text(18, middle, y_label, anchor="middle", extra=turned))
    return parts


def _levels(axes: _Axes, levels: Sequence[Level]) -> list[str]:
    parts = []
    for level in levels:
        y = axes.y(level.y)
        label = f"{level.label} {level.y:.4g}"
        parts.append(
            f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#777777" stroke-width="1.3" '
            f'stroke-dasharray="6 4"/>'
        )
        parts.append(_text(WIDTH - RIGHT - 4, y - 5, label, anchor="end", fill="#555555", size=12))
    return parts


def _curve(axes: _Axes, curve: Series, x_label: str) -> list[str]:
    parts = []
    for run in _finite_runs(curve.points):
        pixels = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in thin(run))
        parts.append(
            f'<polyline points="{pixels}" fill="none" stroke="{curve.color}" stroke-width="{curve.width}" '
            f'stroke-linejoin="round"/>'
        )
        if curve.marked:
            parts.extend(
                f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3.5" fill="{curve.color}">'
                f"<title>{escape(curve.label)}: {y:.4f} at {escape(x_label)} {x:g}</title></circle>"
                for x, y in thin(run)
            )
    return parts


def _finite_runs(points: Sequence[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for point in points:
        if _is_finite(point):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend(series: Sequence[Series]) -> tuple[list[str], int]:
    """The legend and how many lines it takes."""
    parts: list[str] = []
    x, num_lines = float(LEFT), 1
    for curve in series:
        if not curve.label:
            continue
        width = 28 + 7.2 * len(curve.label)
        if x > LEFT and x + width > WIDTH - RIGHT:
            x, num_lines = float(LEFT), num_lines + 1
        y = 50 + _LEGEND_LINE * (num_lines - 1)
        parts.append(
            f'<path d="M{x:.0f} {y}h22" stroke="{curve.color}" stroke-width="{max(2.0, curve.width)}"/>'
        )
        parts.append(_text(x + 28, y + 4, curve.label))
        x += width + 24
    return parts, num_lines


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    fill: str = "#222222",
    size: int = 13,
    weight: str = "400",
    extra: str = "",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}" '
        f'font-weight="{weight}"{extra}>{escape(text)}</text>'
    )


def _short(value: float) -> str:
    return f"{round(value, 10) + 0.0:,.10g}"


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
