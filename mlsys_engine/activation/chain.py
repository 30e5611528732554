"""The values of the budget problem: a chain of blocks with its costs, and a schedule of its steps.

A block's forward can keep nothing (drop), its input alone (checkpoint), or its input and what one of its
options saves. Sizes are bytes of activations that live at once; times are seconds of one microbatch. All
values are frozen, can be compared, and go to JSON and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import encode

DROP, CHECKPOINT, OPTION, BACKWARD = "drop", "checkpoint", "option", "backward"
STEP_ACTIONS = (DROP, CHECKPOINT, OPTION, BACKWARD)
_LETTERS = {DROP: "D", CHECKPOINT: "C", BACKWARD: "B"}
_MOST_BYTES = 2**50  # far above any memory, and sums over thousands of blocks stay exact in 64 bits


@dataclass(frozen=True, kw_only=True)
class OptionCosts:
    """One way to run a block so that its backward can follow."""

    name: str
    forward_s: float
    backward_s: float  # with whatever the option computes or moves again then
    saved_bytes: int  # what stays from the forward to the backward: the output, but not the input
    forward_peak_bytes: int  # while the forward runs, besides the block's input; saved_bytes included
    backward_peak_bytes: int  # while the backward runs, likewise, with the gradients of output and input

    def __post_init__(self) -> None:
        where = f"Option {self.name!r}"
        if not self.name or not all(c.isalnum() or c in "_-" for c in self.name):
            raise ConfigError(
                f"An option named {self.name!r}.",
                "A name has letters, digits, _ and - alone.",
                "Name it after what it does, such as keep.",
            )
        _take_seconds(self, where, "forward_s", "backward_s")
        _check_bytes(where, saved_bytes=self.saved_bytes)
        peaks = {
            "forward_peak_bytes": self.forward_peak_bytes,
            "backward_peak_bytes": self.backward_peak_bytes,
        }
        _check_bytes(where, **peaks)
        for field, value in peaks.items():
            if value < self.saved_bytes:
                raise ConfigError(
                    f"{where} has {field}={value}, less than its saved_bytes={self.saved_bytes}.",
                    "What stays over the step is there while it runs, so a peak includes it.",
                    "Add saved_bytes to the peak.",
                )


@dataclass(frozen=True, kw_only=True)
class BlockCosts:
    """A block, its options, and its forward when only the output is wanted."""

    name: str
    input_bytes: int  # not counted for the first block, whose input is there anyway
    options: tuple[OptionCosts, ...]
    drop_forward_s: float
    drop_peak_bytes: int  # while that runs, besides the block's input; the output included
    output_gradient_bytes: int = 0  # waits for the backward while earlier blocks are run again
    splittable: bool = True  # False: the input is no other block's output, and is stored once it exists

    def __post_init__(self) -> None:
        where = f"Block {self.name!r}"
        names = [option.name for option in self.options]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"{where} has the options {names}.",
                "A block has at least one option, each with a name of its own.",
                "Give the option that keeps everything, at least.",
            )
        _take_seconds(self, where, "drop_forward_s")
        _check_bytes(
            where,
            input_bytes=self.input_bytes,
            drop_peak_bytes=self.drop_peak_bytes,
            output_gradient_bytes=self.output_gradient_bytes,
        )

    def option(self, name: str) -> OptionCosts:
        """The option of that name; raises ConfigError without one."""
        for option in self.options:
            if option.name == name:
                return option
        raise ConfigError(
            f"Block {self.name!r} was asked for an option {name!r}.",
            f"It has {', '.join(option.name for option in self.options)}.",
            "Solve again for this chain.",
        )


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Blocks in execution order; each one's input is the output of the one before unless not splittable."""

    blocks: tuple[BlockCosts, ...]

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ConfigError(
                "A chain without blocks.", "It has at least one.", "Profile the model's blocks."
            )

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        options = sorted({option.name for block in self.blocks for option in block.options})
        return f"chain of {len(self)} blocks with options {', '.join(options)}"

    def to_json(self, indent: int | None = None) -> str:
        """The chain as JSON; `from_json` gives back an equal value."""
        return encode.to_json(self, indent)

    @classmethod
    def from_json(cls, text: str) -> Chain:
        """The chain that `to_json` wrote; raises ConfigError for a damaged text."""
        return encode.from_json(cls, text)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward or backward of a block."""

    action: str  # one of STEP_ACTIONS
    block: int  # place in the chain
    option: str | None = None  # the option's name when the action is "option"

    def __post_init__(self) -> None:
        if (
            self.action not in STEP_ACTIONS
            or (self.option is None) == (self.action == OPTION)
            or self.block < 0
        ):
            raise ConfigError(
                f"A step {self.action!r} of block {self.block} with option {self.option!r}.",
                f"The action is one of {', '.join(STEP_ACTIONS)}; an option's name goes with {OPTION!r}.",
                "Take the steps from a Schedule.",
            )

    def __str__(self) -> str:
        return f"{self.option}:{self.block}" if self.option else f"{_LETTERS[self.action]}{self.block}"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All forwards and backwards of one microbatch in order, with what they are predicted to take."""

    steps: tuple[Step, ...]
    seconds: float
    peak_bytes: int  # of the activations that the steps hold; the first block's input is not counted
    budget_bytes: int  # what peak_bytes had to stay below

    def __str__(self) -> str:
        """Such as `C0 D1 K2 B2 K0 K1 B1 B0`: Drop, Checkpoint, Backward, and a letter for each option."""
        letters = option_letters(step.option for step in self.steps if step.option)
        steps = " ".join(
            f"{letters[step.option]}{step.block}" if step.option else str(step) for step in self.steps
        )
        legend = ", ".join(f"{letter} {name}" for name, letter in letters.items())
        return (
            f"{self.seconds:.6g} s, peak {self.peak_bytes} of {self.budget_bytes} bytes; "
            f"D drop, C checkpoint, B backward, {legend}\n{steps}"
        )

    def options_of_last_forwards(self) -> dict[int, str]:
        """The option under which each block's backward runs, by the block's place in the chain."""
        return {step.block: step.option for step in self.steps if step.option}

    def to_json(self, indent: int | None = None) -> str:
        """The schedule as JSON; `from_json` gives back an equal value."""
        return encode.to_json(self, indent)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule that `to_json` wrote; raises ConfigError for a damaged text."""
        return encode.from_json(cls, text)


def option_letters(names: Iterable[str]) -> dict[str, str]:
    """A capital for each name: its first letter that is free, else any; the whole name when none is."""
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in _LETTERS.values()]
    letters: dict[str, str] = {}
    for name in dict.fromkeys(names):
        own = [letter for letter in name.upper() if letter in free] or free
        letters[name] = own[0] if own else f"{name}:"
        free = [letter for letter in free if letter != letters[name]]
    return letters


def _take_seconds(costs: OptionCosts | BlockCosts, where: str, *fields: str) -> None:
    for field in fields:
        value = getattr(costs, field)
        if not isinstance(value, float | int) or not math.isfinite(value) or value < 0:
            raise ConfigError(
                f"{where} has {field}={value!r}.",
                "A time is a finite number of seconds, 0 or more.",
                "Measure the block again.",
            )
        object.__setattr__(costs, field, float(value))  # 0 and 0.0 are equal, but not the same JSON


def _check_bytes(where: str, **sizes: int) -> None:
    for field, value in sizes.items():
        if type(value) is not int or not 0 <= value <= _MOST_BYTES:
            raise ConfigError(
                f"{where} has {field}={value!r}.",
                "A size is a whole number of bytes from 0 to 2**50.",
                "Measure the block again.",
            )
