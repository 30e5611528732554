"""Pictures of an activation plan: for a terminal, and as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlsys_engine.activation.blocks import KEEP
from mlsys_engine.activation.chain import (
    BACKWARD,
    CHECKPOINT,
    DROP,
    OPTION,
    Chain,
    Schedule,
    Step,
    option_letters,
)
from mlsys_engine.activation.simulate import simulate
from mlsys_engine.activation.table import in_words, size
from mlsys_engine.tracking.line_chart import Level, Point, Series, line_chart

if TYPE_CHECKING:
    from mlsys_engine.activation.budget import ActivationPlan

_MIB = 2**20
_BAR, _ROWS = 24, 8  # characters: a block's longest bar, and the height of the curve
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_PLAIN, _COLORS = "#9a9a9a", {"forward": "#1b62a8", "forward again": "#c8401f", "backward": "#2e8b57"}


def lines(plan: ActivationPlan, width: int) -> list[str]:
    """A bar for each block (of what the plain model keeps, what stays), then memory over the steps."""
    letters = _Letters(plan.schedule)
    return [*_bars(plan, letters), "", *_curve(plan, letters, width), "", letters.legend()]


def svg(plan: ActivationPlan) -> str:
    """Memory over the predicted time of the schedule's steps, and of the plain model's; the budget's line."""
    chain, fixed = plan.profile.chain, plan.profile.fixed_bytes
    plain = [point for _, points in _runs(chain, _everything_kept(chain), fixed) for point in points]
    runs = list(_runs(chain, plan.schedule, fixed))
    named: set[str] = set()
    series = [Series(label="everything kept", points=plain, color=_PLAIN, width=1.5)]
    for kind, points in runs:
        label = "" if kind in named else kind
        series.append(Series(label=label, points=points, color=_COLORS[kind]))
        named.add(kind)
    return line_chart(
        title=f"Activations of {len(plan.profile.names)} blocks under a budget",
        x_label="milliseconds in the blocks, as predicted",
        y_label="MiB",
        series=series,
        levels=[Level(label="budget", y=plan.budget_bytes / _MIB)],
        note=f"measured peak {size(plan.measured_peak_bytes)}",
    )


class _Letters:
    """The letters of a schedule's steps, as printing it has them."""

    def __init__(self, schedule: Schedule) -> None:
        self._options = option_letters(step.option for step in schedule.steps if step.option)
        self._actions = {step.action for step in schedule.steps}

    def of(self, step: Step) -> str:
        return self._options[step.option] if step.option else step.action[0].upper()

    def legend(self) -> str:
        plain = {DROP: "D nothing stays", CHECKPOINT: "C the input stays"}
        options = (f"{letter} {in_words(name)}" for name, letter in self._options.items())
        used = (words for action, words in plain.items() if action in self._actions)
        return "; ".join([*used, *options, "B backward"])


@dataclass(frozen=True)
class _Column:
    letter: str
    num_bytes: int


def _bars(plan: ActivationPlan, letters: _Letters) -> list[str]:
    first: dict[int, Step] = {}
    for step in plan.schedule.steps:
        first.setdefault(step.block, step)
    blocks = plan.profile.chain.blocks
    kept = simulate(plan.profile.chain, plan.schedule).kept_bytes
    plain = [block.options[0].saved_bytes for block in blocks]
    most, width = max(*plain, *kept, 1), max(map(len, plan.profile.names))
    found = []
    for place, name in enumerate(plan.profile.names):
        full = math.ceil(_BAR * kept[place] / most)
        bar = "█" * full + "░" * (math.ceil(_BAR * plain[place] / most) - full)
        found.append(
            f"{name:<{width}}  {letters.of(first[place])}  {bar:<{_BAR}}  "
            f"{size(kept[place])} of {size(plain[place])}"
        )
    return found


def _curve(plan: ActivationPlan, letters: _Letters, width: int) -> list[str]:
    columns = _columns(plan, letters, width)
    top = max(plan.profile.plain_peak_bytes, plan.budget_bytes, *(column.num_bytes for column in columns))
    budget_row = min(math.ceil(_ROWS * plan.budget_bytes / top) - 1, _ROWS - 1)
    labels = {_ROWS - 1: size(top), budget_row: f"budget {size(plan.budget_bytes)}"}
    margin = max(map(len, labels.values()))
    found = []
    for row in reversed(range(_ROWS)):
        empty = "╌" if row == budget_row else " "
        cells = [_cell(_ROWS * column.num_bytes / top - row) for column in columns]
        drawn = "".join(empty if cell == " " else cell for cell in cells)
        found.append(f"{labels.get(row, ''):>{margin}} {'┤' if row in labels else '│'}{drawn}".rstrip())
    steps = "".join(column.letter for column in columns)
    return [*found, f"{'step':>{margin}}  {steps}"]


def _cell(height: float) -> str:
    """A block character for what of a row is filled, 0 to 1 and beyond."""
    return _EIGHTHS[round(8 * min(max(height, 0.0), 1.0))]


def _columns(plan: ActivationPlan, letters: _Letters, width: int) -> list[_Column]:
    """One for each step; of a longer schedule the fullest step of neighbours that share a column."""
    chain, steps = plan.profile.chain, plan.schedule.steps
    step_bytes = simulate(chain, plan.schedule).step_bytes
    single = [
        _Column(letters.of(step), num_bytes + plan.profile.fixed_bytes)
        for step, num_bytes in zip(steps, step_bytes, strict=True)
    ]
    count = min(max(width, 1), len(single))
    ends = [index * len(single) // count for index in range(count + 1)]
    return [
        max(single[start:stop], key=lambda column: column.num_bytes)
        for start, stop in itertools.pairwise(ends)
    ]


def _everything_kept(chain: Chain) -> Schedule:
    forward = [Step(action=OPTION, block=place, option=KEEP) for place in range(len(chain))]
    backward = [Step(action=BACKWARD, block=place) for place in reversed(range(len(chain)))]
    return Schedule(steps=(*forward, *backward), seconds=0.0, peak_bytes=0, budget_bytes=0)


def _runs(chain: Chain, schedule: Schedule, fixed_bytes: int) -> Iterator[tuple[str, list[Point]]]:
    """Steps of one kind in a row: (milliseconds, MiB) of a curve that goes on where the run before ended."""
    simulation = simulate(chain, schedule)
    last: Point = (0.0, 0.0)
    for kind, group in itertools.groupby(
        zip(_kinds(schedule.steps), simulation.step_seconds, simulation.step_bytes, strict=True),
        key=lambda entry: entry[0],
    ):
        points = [last]
        for _, seconds, num_bytes in group:
            height = (num_bytes + fixed_bytes) / _MIB
            points += [(last[0], height), (last[0] + seconds * 1e3, height)]
            last = points[-1]
        yield kind, points
    yield "backward", [last, (last[0], 0.0)]


def _kinds(steps: Sequence[Step]) -> list[str]:
    seen: set[int] = set()
    kinds = []
    for step in steps:
        again = "forward again" if step.block in seen else "forward"
        kinds.append("backward" if step.action == BACKWARD else again)
        seen.add(step.block)
    return kinds
