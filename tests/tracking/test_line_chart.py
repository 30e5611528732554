from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest

from mlsys_engine.tracking.line_chart import HEIGHT, MAX_POINTS, WIDTH, Level, Series, line_chart, thin, ticks

_SVG = "{http://www.w3.org/2000/svg}"


def _draw(*series: Series, levels: tuple[Level, ...] = ()) -> ElementTree.Element:
    return ElementTree.fromstring(
        line_chart(title="a <title> & more", x_label="step", y_label="loss", series=series, levels=levels)
    )


def _points(root: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = root.findall(f"{_SVG}polyline")
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.get("points", "").split())]
        for line in lines
    ]


def _texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{_SVG}text")]


def test_the_chart_is_xml_with_every_point_inside_the_frame_and_in_proportion() -> None:
    root = _draw(Series(label="train", points=[(0, 4.0), (50, 2.0), (100, 3.0)], color="#000"))
    ((first, second, third),) = _points(root)
    assert first[0] < second[0] < third[0]
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)  # written with one decimal
    # Pixels grow downwards: 4.0 is highest, and 3.0 lies halfway between it and 2.0.
    assert first[1] < third[1] < second[1]
    assert third[1] == pytest.approx((first[1] + second[1]) / 2, abs=0.1)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in (first, second, third))


def test_title_axes_legend_and_levels_are_written() -> None:
    root = _draw(
        Series(label="train", points=[(0, 4.0)], color="#000"), levels=(Level(label="bigram", y=3.47),)
    )
    assert {"a <title> & more", "step", "loss", "train", "bigram 3.47"} <= set(_texts(root))
    dashed = [path for path in root.iter(f"{_SVG}path") if path.get("stroke-dasharray")]
    assert len(dashed) == 1


def test_marked_points_have_a_tooltip_each() -> None:
    root = _draw(Series(label="validation", points=[(10, 3.0), (20, 2.5)], color="#000", marked=True))
    titles = [circle.find(f"{_SVG}title") for circle in root.findall(f"{_SVG}circle")]
    assert [title.text for title in titles if title is not None] == [
        "validation: 3.0000 at step 10",
        "validation: 2.5000 at step 20",
    ]


def test_points_that_are_not_finite_leave_a_gap_and_are_counted() -> None:
    points = [(1, 2.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.0), (6, 1.0)]
    root = _draw(Series(label="train", points=points, color="#000"))
    assert [len(run) for run in _points(root)] == [2, 2]
    assert "2 points not finite" in _texts(root)


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_a_chart_without_points_says_so(points: list[tuple[float, float]]) -> None:
    root = _draw(Series(label="train", points=points, color="#000"))
    assert _points(root) == []
    assert any("no points yet" in text for text in _texts(root))


def test_one_point_and_equal_points_are_drawn() -> None:
    assert _points(_draw(Series(label="train", points=[(1, 0.0)], color="#000"))) != []
    assert _points(_draw(Series(label="train", points=[(1, 5.0), (2, 5.0)], color="#000"))) != []


def test_thinning_keeps_the_spike_and_the_order() -> None:
    points = [(float(x), 9.0 if x == 7777 else 1.0 + x % 3) for x in range(20_000)]
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert (7777.0, 9.0) in kept
    assert kept == sorted(kept)


@pytest.mark.parametrize(("low", "high"), [(0, 600), (2.3, 8.0), (-3, 5e-3), (1e-7, 3e-7), (5, 5), (0, 0)])
def test_ticks_are_evenly_spaced_and_enclose_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-9 and high - 1e-9 <= found[-1]
    assert max(steps) == pytest.approx(min(steps))


def test_a_long_legend_takes_more_lines_and_the_curves_stay_below_it() -> None:
    points = [(0, 1.0), (1, 2.0)]
    root = _draw(
        *(Series(label=f"a long label {i} of a curve", points=points, color="#000") for i in range(9))
    )
    names = [text for text in root.iter(f"{_SVG}text") if (text.text or "").startswith("a long label")]
    lowest = max(float(text.get("y", "")) for text in names)
    assert len(names) == 9 and lowest < min(y for line in _points(root) for _, y in line)
    assert all(float(text.get("x", "")) + 7 * len(text.text or "") < WIDTH for text in names)


def test_a_curve_without_a_label_is_drawn_without_a_legend() -> None:
    root = _draw(Series(label="", points=[(0, 1.0), (1, 2.0)], color="#000"))
    named = _draw(Series(label="train", points=[(0, 1.0), (1, 2.0)], color="#000"))
    assert _points(root) == _points(named)
    assert len(list(root.iter(f"{_SVG}path"))) == len(list(named.iter(f"{_SVG}path"))) - 1
