"""Finds the fastest schedules of a chain within budgets of memory: the Python side of csrc/activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlsys_engine.activation.chain import OPTION, STEP_ACTIONS, Chain, Schedule, Step
from mlsys_engine.errors import ConfigError
from mlsys_engine.native import load_activation


@dataclass(frozen=True, kw_only=True)
class MemoryRange:
    """The budgets between which there is something to choose."""

    least_bytes: int  # no schedule of the chain needs less
    enough_bytes: int  # from here on every block runs its fastest option


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The schedules for several budgets, and the table that they come from."""

    schedules: tuple[Schedule, ...]
    memory: MemoryRange
    unit_bytes: int  # sizes were rounded up to this; 0 when no table was needed
    num_slots: int  # sizes of memory up to enough_bytes
    num_problems: int  # different parts of the chain


def solve(chain: Chain, budget_bytes: int, *, num_slots: int | None = None) -> Schedule:
    """The schedule of least time whose peak stays within the budget; called when a plan is made.

    More `num_slots` round sizes less and take proportionally longer; None chooses by the chain.
    Raises ConfigError with the least budget when that is not enough. More budget is never slower.
    """
    return curve(chain, [budget_bytes], num_slots=num_slots).schedules[0]


def curve(chain: Chain, budgets_bytes: Sequence[int], *, num_slots: int | None = None) -> Curve:
    """The schedule for each budget, in the order given, at the cost of one. Raises ConfigError as `solve`."""
    for budget in budgets_bytes:
        if type(budget) is not int or budget < 0:
            raise ConfigError(
                f"budget_bytes={budget!r} was given for a {chain}.",
                "A budget is a whole number of bytes, 0 or more.",
                "Convert it: int(gib * 2**30).",
            )
    if num_slots is not None and (type(num_slots) is not int or not 1 <= num_slots <= 10**6):
        raise ConfigError(
            f"num_slots={num_slots!r} was given for a {chain}.",
            "It is a number from 1 to 1,000,000, or None.",
            "Leave it out, or give at least 20 for each block.",
        )
    solution = load_activation().solve_chain(_native(chain), list(budgets_bytes), num_slots or 0)
    memory = MemoryRange(least_bytes=solution.least_bytes, enough_bytes=solution.enough_bytes)
    for budget in budgets_bytes:
        if budget < memory.least_bytes:
            raise ConfigError(
                f"A budget of {budget:,} bytes of activations was given for a {chain}.",
                f"Its most frugal schedule needs {memory.least_bytes:,} bytes.",
                f"Give at least {memory.least_bytes}, make the microbatch smaller, or allow more options.",
            )
    return Curve(
        schedules=tuple(
            _schedule(chain, found, budget)
            for found, budget in zip(solution.schedules, budgets_bytes, strict=True)
        ),
        memory=memory,
        unit_bytes=solution.unit_bytes,
        num_slots=solution.num_slots,
        num_problems=solution.num_problems,
    )


def memory_range(chain: Chain) -> MemoryRange:
    """The least budget that can be given, and the one above which more changes nothing; takes no table."""
    return curve(chain, []).memory


def _native(chain: Chain) -> list[Any]:
    native = load_activation()
    return [
        native.BlockCosts(
            input_bytes=block.input_bytes,
            splittable=block.splittable,
            drop_forward_s=block.drop_forward_s,
            drop_peak_bytes=block.drop_peak_bytes,
            output_gradient_bytes=block.output_gradient_bytes,
            options=[
                native.OptionCosts(
                    forward_s=option.forward_s,
                    backward_s=option.backward_s,
                    saved_bytes=option.saved_bytes,
                    forward_peak_bytes=option.forward_peak_bytes,
                    backward_peak_bytes=option.backward_peak_bytes,
                )
                for option in block.options
            ],
        )
        for block in chain.blocks
    ]


def _schedule(chain: Chain, found: Any, budget: int) -> Schedule:
    steps = []
    for number, block, option in found.steps:
        action = STEP_ACTIONS[number]  # in the order of csrc/activation/chain.h
        name = chain.blocks[block].options[option].name if action == OPTION else None
        steps.append(Step(action=action, block=block, option=name))
    return Schedule(
        steps=tuple(steps), seconds=found.seconds, peak_bytes=found.peak_bytes, budget_bytes=budget
    )
