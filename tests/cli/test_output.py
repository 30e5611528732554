from __future__ import annotations

import json

import pytest

from mlsys_engine.cli.output import Output, figure
from mlsys_engine.cli.sparkline import sparkline


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (3, "3"),
        (12345, "12,345"),
        (8.0, "8.0000"),
        (0.0, "0.0000"),
        (-0.25, "-0.2500"),
        (1e-5, "1e-05"),
        (1234.56, "1,235"),
        ("NaN", "nan"),
        (float("inf"), "inf"),
        ("mlsys", "mlsys"),
        (True, "True"),
    ],
)
def test_figures_are_short_and_say_what_they_are(value: object, text: str) -> None:
    assert figure(value) == text


def test_json_goes_alone_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.say("for people")
    out.table("", ("a",), [["1"]])
    out.json({"loss": float("nan")})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"loss": "NaN"}
    assert "for people" in captured.err


def test_a_silent_voice_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for out in (Output(silent=True), Output(as_json=True, silent=True)):
        out.say("x")
        out.table("t", ("a",), [["1"]])
        out.pairs([("a", "b")])
        out.json({})
    assert capsys.readouterr() == ("", "")


def test_text_that_looks_like_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Output().say("[bold]x[/bold] [0, 1]")
    assert capsys.readouterr().out == "[bold]x[/bold] [0, 1]\n"


def test_a_sparkline_goes_from_the_lowest_to_the_highest_block() -> None:
    line = sparkline([3.0, 2.0, 1.0, 0.0])
    assert line[0] == "█" and line[-1] == "▁" and len(line) == 4


def test_a_sparkline_is_no_wider_than_asked_and_averages_neighbours() -> None:
    line = sparkline([float(index) for index in range(1000)], width=8)
    assert line == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(
    ("values", "line"),
    [([], ""), ([1.0], "▅"), ([2.0, 2.0], "▅▅"), ([float("nan")], "·"), ([0.0, float("inf"), 1.0], "▁·█")],
)
def test_sparklines_of_odd_series(values: list[float], line: str) -> None:
    assert sparkline(values) == line
