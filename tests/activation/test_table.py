"""A plan prints what it chose for each block, and its pictures show the budget and every block."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlsys_engine.activation import ActivationPlan
from mlsys_engine.activation.chain import BlockCosts, Chain, OptionCosts, Schedule, Step
from mlsys_engine.activation.profile import Profile
from mlsys_engine.activation.simulate import simulate
from mlsys_engine.activation.table import in_words

_SVG = "{http://www.w3.org/2000/svg}"
_ACTIONS = {"D": "drop", "C": "checkpoint", "B": "backward"}
_OPTIONS = {"K": "keep", "S": "selective", "I": "int8"}


def _option(name: str, forward_ms: float, saved_kib: int) -> OptionCosts:
    saved = saved_kib * 1024
    return OptionCosts(
        name=name,
        forward_s=forward_ms / 1e3,
        backward_s=3e-3,
        saved_bytes=saved,
        forward_peak_bytes=saved,
        backward_peak_bytes=saved,
    )


def _plan(text: str, num_blocks: int, budget_kib: int) -> ActivationPlan:
    """A plan with the steps `text`, of blocks that save 100, 60 or 25 KiB and are given 8."""
    options = (_option("keep", 1, 100), _option("selective", 1.5, 60), _option("int8", 1.25, 25))
    block = BlockCosts(name="b", input_bytes=8192, options=options, drop_forward_s=1e-3, drop_peak_bytes=8192)
    chain = Chain(blocks=(block,) * num_blocks)
    steps = tuple(
        Step(action=_ACTIONS.get(word[0], "option"), block=int(word[1:]), option=_OPTIONS.get(word[0]))
        for word in text.split()
    )
    schedule = Schedule(steps=steps, seconds=0, peak_bytes=0, budget_bytes=budget_kib * 1024)
    peak = simulate(chain, schedule).peak_bytes + 2048
    return ActivationPlan(
        actions=(),
        profile=Profile(
            names=tuple(f"layers.{place}" for place in range(num_blocks)),
            chain=chain,
            fixed_bytes=2048,
            takes_cache=False,
            plain_peak_bytes=num_blocks * 100 * 1024 + 2048,
            plain_seconds=0.02,
        ),
        schedule=schedule,
        budget_bytes=budget_kib * 1024,
        predicted_peak_bytes=peak,
        measured_peak_bytes=peak,
        measured_seconds=0.025,
    )


MIXED = _plan("K0 S1 I2 C3 D4 K5 B5 K3 K4 B4 B3 B2 B1 B0", 6, 350)


def _row(plan: ActivationPlan, name: str) -> list[str]:
    (line,) = [line for line in str(plan).splitlines() if line.strip().startswith(name)]
    return [cell.strip() for cell in line.strip().split("  ") if cell]


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("layers.0", ["100.0 KiB", "100.0 KiB", "1.00 ms", "0.00 ms", "3.00 ms", "keep everything"]),
        ("layers.1", ["60.0 KiB", "100.0 KiB", "1.50 ms", "0.00 ms", "3.00 ms", in_words("selective")]),
        ("layers.2", ["25.0 KiB", "100.0 KiB", "1.25 ms", "0.00 ms", "3.00 ms", in_words("int8")]),
        ("layers.3", ["0 B", "100.0 KiB", "1.00 ms", "1.00 ms", "3.00 ms", "recompute from its input"]),
        ("layers.4", ["0 B", "100.0 KiB", "1.00 ms", "1.00 ms", "3.00 ms", "recompute after layers.3"]),
        # What it is given was dropped by the block before, so it keeps that itself.
        ("layers.5", ["108.0 KiB", "100.0 KiB", "1.00 ms", "0.00 ms", "3.00 ms", "keep everything"]),
        ("together", ["295.0 KiB", "602.0 KiB", "6.75 ms", "2.00 ms", "18.00 ms"]),
    ],
)
def test_a_row_has_the_bytes_and_times_of_what_was_chosen(name: str, cells: list[str]) -> None:
    assert _row(MIXED, name)[1:] == cells


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (
            "recompute linked after C a D b K c with int8",
            "recompute after a to c, then pack what is kept to int8",
        ),
        ("selective-offload", "compute cheap outputs again, move the rest away"),
        ("offload", "move what is kept away"),
    ],
)
def test_an_action_is_told_in_words(action: str, words: str) -> None:
    assert in_words(action) == words


def test_the_terminal_picture_has_a_bar_for_every_block_and_the_budget_line() -> None:
    lines = MIXED.picture().splitlines()
    bars = [line.split() for line in lines[:6]]
    assert [(bar[0], bar[1]) for bar in bars] == [
        (f"layers.{i}", letter) for i, letter in enumerate("KSICDK")
    ]
    full = [bar[2].count("█") for bar in bars]
    assert full[5] >= full[0] > full[1] > full[2] > full[3] == full[4] == 0
    assert len({len(bar[2]) for bar in bars[:5]}) == 1, "what stays and what goes are the plain model's bytes"
    (budget,) = [line for line in lines if line.startswith("budget 350.0 KiB ┤")]
    assert "╌" in budget
    assert lines[-3].split() == ["step", "KSICDKBKKBBBBB"]
    above = lines[7 : lines.index(budget)]
    assert above and not any("█" in line for line in above), "the curve stays below the budget"


def test_a_longer_schedule_shares_columns_and_keeps_its_peak() -> None:
    steps = [*(f"K{place}" for place in range(90)), *(f"B{place}" for place in reversed(range(90)))]
    plan = _plan(" ".join(steps), 90, 9002)
    lines = plan.picture(width=40).splitlines()
    assert len(lines[-3].split()[1]) == 40
    assert "█" in next(line for line in lines if line.startswith("budget"))


def test_the_saved_picture_is_xml_with_both_curves_and_the_budget(tmp_path: Path) -> None:
    MIXED.save_picture(tmp_path / "plan.svg")
    root = ElementTree.fromstring((tmp_path / "plan.svg").read_text())
    texts = {element.text or "" for element in root.iter(f"{_SVG}text")}
    assert {"everything kept", "forward", "forward again", "backward"} <= texts
    assert any(text.startswith("budget 0.34") for text in texts)  # MiB
    plain, *own = [
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        for line in root.iter(f"{_SVG}polyline")
    ]
    # Pixels grow downwards, and to the right: the plan's peak is lower and its end later.
    assert min(y for points in own for _, y in points) > min(y for _, y in plain)
    assert own[-1][-1][0] > plain[-1][0]
    assert all(before[-1] == after[0] for before, after in itertools.pairwise(own))
