"""An activation plan as a table: for each block what it keeps, what that takes, and its action in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlsys_engine.activation.blocks import KEEP
from mlsys_engine.activation.chain import BACKWARD, Chain, Schedule
from mlsys_engine.activation.options import OFFLOAD, OPTIONS
from mlsys_engine.activation.segments import actions_of, parse
from mlsys_engine.activation.simulate import simulate

if TYPE_CHECKING:
    from mlsys_engine.activation.budget import ActivationPlan

_HEAD = ("block", "keeps", "of plain", "forward", "again", "backward")


def lines(plan: ActivationPlan) -> list[str]:
    """The lines of the table.

    "keeps" is what stays of a block between forward and backward, "of plain" what the plain model keeps of
    it; "again" is the time of all its forwards but the first. Times of single blocks are predictions.
    """
    chain, schedule, actions = plan.profile.chain, plan.schedule, _actions(plan)
    kept = simulate(chain, schedule).kept_bytes
    plain = tuple(block.options[0].saved_bytes for block in chain.blocks)
    times = _times(chain, schedule)
    names = (*plan.profile.names, *("after the blocks" for _ in chain.blocks[len(actions) :]))
    rows = [
        (name, size(have), size(whole), *map(_milliseconds, spent), words)
        for name, have, whole, spent, words in zip(
            names, kept, plain, times, [*map(in_words, actions), ""], strict=False
        )
    ]
    fixed = plan.profile.fixed_bytes
    rows.append(("outside of them", size(fixed), size(fixed), "", "", "", ""))
    totals = map(_milliseconds, map(sum, zip(*times, strict=True)))
    rows.append(("together", size(sum(kept) + fixed), size(sum(plain) + fixed), *totals, ""))
    return [*_summary(plan), *_columns([(*_HEAD, "action"), *rows])]


def in_words(action: str) -> str:
    """What a block with this action does, such as "recompute from its input"."""
    rerun = parse(action)
    if rerun is None:
        return _option_in_words(action)
    others = [name for _, name in rerun.before]
    words = "recompute" if rerun.linked else "recompute from its input"
    if others:
        words += f" after {f'{others[0]} to {others[-1]}' if len(others) > 2 else ' and '.join(others)}"
    return words if rerun.option == KEEP else f"{words}, then {_option_in_words(rerun.option)}"


def size(num_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def _option_in_words(name: str) -> str:
    option = OPTIONS.get(name)
    if option is None:
        return "keep everything" if name == KEEP else name
    cheap = ["compute cheap outputs again"] if option.drops_cheap else []
    what = "the rest" if option.drops_cheap else "what is kept"
    if option.form is None:
        return cheap[0]
    form = f"move {what} away" if option.form == OFFLOAD else f"pack {what} to {option.form}"
    return ", ".join([*cheap, form])


def _actions(plan: ActivationPlan) -> list[str]:
    return list(actions_of(plan.schedule, plan.profile.names).values())


def _times(chain: Chain, schedule: Schedule) -> list[tuple[float, float, float]]:
    """Seconds of each block's first forward, of its other forwards, and of its backward."""
    times = [[0.0, 0.0, 0.0] for _ in chain.blocks]
    seen: set[int] = set()
    for step, seconds in zip(schedule.steps, simulate(chain, schedule).step_seconds, strict=True):
        column = 2 if step.action == BACKWARD else int(step.block in seen)
        times[step.block][column] += seconds
        seen.add(step.block)
    return [(first, again, backward) for first, again, backward in times]


def _summary(plan: ActivationPlan) -> list[str]:
    timed = f"{plan.measured_seconds * 1e3:.1f} ms" if plan.measured_seconds else "not timed"
    return [
        f"Activations: {size(plan.measured_peak_bytes)} of a budget of {size(plan.budget_bytes)} "
        f"(predicted {size(plan.predicted_peak_bytes)}); everything kept is "
        f"{size(plan.profile.plain_peak_bytes)}.",
        f"Forward and backward: {timed}; everything kept takes {plan.profile.plain_seconds * 1e3:.1f} ms.",
    ]


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    found = []
    for first, *numbers, last in rows:
        cells = [f"{first:<{widths[0]}}"]
        cells += [f"{text:>{width}}" for text, width in zip(numbers, widths[1:-1], strict=True)]
        found.append("  " + "  ".join([*cells, last]).rstrip())
    return found


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
