"""Replays a schedule of a chain, block by block, and says what it takes, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_engine.activation.chain import (
    BACKWARD,
    DROP,
    Chain,
    OptionCosts,
    Schedule,
    Step,
)
from mlsys_engine.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What the steps of a schedule take together."""

    seconds: float
    step_seconds: tuple[float, ...]
    step_bytes: tuple[int, ...]  # the peak while each step runs
    kept_bytes: tuple[int, ...]  # of each block, between the forward's end and the first backward

    @property
    def peak_bytes(self) -> int:
        """The most that is held at a time."""
        return max(self.step_bytes)


def simulate(chain: Chain, schedule: Schedule) -> Simulation:
    """Seconds and peak of the schedule's steps on the chain, checking that each finds what it needs.

    Of the schedule, only the steps are looked at. Raises ConfigError at the first step whose input is not
    there, at a backward out of order or without a saved option, and when backwards are missing at the end.
    """
    replay = _Replay(chain)
    for position, step in enumerate(schedule.steps):
        problem = replay.problem_with(step)
        if problem:
            raise ConfigError(
                f"Step {position}, {step}, of a schedule for {len(chain)} blocks: {problem}.",
                "Every step finds its input, and backwards follow from the last block to the first.",
                "Solve again for this chain.",
            )
        replay.run(step)
    if replay.num_left:
        raise ConfigError(
            f"A schedule that ends with {replay.num_left} of {len(chain)} backwards missing.",
            "Every block's backward runs once.",
            "Solve again for this chain.",
        )
    return Simulation(
        seconds=replay.seconds,
        step_seconds=tuple(replay.step_seconds),
        step_bytes=tuple(replay.step_bytes),
        kept_bytes=replay.kept_bytes,
    )


class _Replay:
    """What is held after the steps so far."""

    def __init__(self, chain: Chain) -> None:
        self._blocks = chain.blocks
        self.num_left = len(chain)  # backwards to come: of the blocks 0 ... num_left - 1
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self.step_bytes: list[int] = []
        self.kept_bytes: tuple[int, ...] = ()
        self._inputs: dict[int, int] = {}  # block -> bytes of its input, stored on its own
        self._saved: dict[int, OptionCosts] = {}
        self._last_output_for: int | None = None  # the block that the last step's output is the input of

    def problem_with(self, step: Step) -> str | None:
        """Why the step cannot run now."""
        if step.block >= self.num_left:
            return "the block does not exist or its backward has run"
        if step.action == BACKWARD:
            if step.block != self.num_left - 1:
                return f"the backward of block {self.num_left - 1} comes first"
            if step.block not in self._saved:
                return "no option's forward has saved what the backward needs"
        elif step.block in self._saved:
            return "the block's backward already has what it needs"
        passes_by = step.action != BACKWARD and self._last_output_for == step.block
        return None if self._is_stored(step.block) or passes_by else "the block's input is not there"

    def run(self, step: Step) -> None:
        block = self._blocks[step.block]
        if step.action == BACKWARD:
            if self.num_left == len(self._blocks):
                self.kept_bytes = tuple(self._held(place) for place in range(self.num_left))
            used = self._saved.pop(step.block)
            self._count(used.backward_s, used.backward_peak_bytes)
            self._inputs.pop(step.block, None)
            self.num_left, self._last_output_for = step.block, None
            return
        passing = 0 if self._is_stored(step.block) else block.input_bytes
        option = None if step.option is None else block.option(step.option)
        seconds, peak = (
            (block.drop_forward_s, block.drop_peak_bytes)
            if option is None
            else (option.forward_s, option.forward_peak_bytes)
        )
        self._count(seconds, passing + peak + self._waiting_gradient())
        if step.action == DROP and block.splittable:
            self._inputs.pop(step.block, None)
        elif not self._is_stored(step.block):
            self._inputs[step.block] = block.input_bytes
        if option is not None:
            self._saved[step.block] = option
        self._pass_on(step.block + 1)

    def _pass_on(self, follower: int) -> None:
        """The step's output becomes the input of the following block, unless that is done already."""
        self._last_output_for = follower if follower < self.num_left else None
        if follower < self.num_left and not self._blocks[follower].splittable:
            self._inputs[follower] = self._blocks[follower].input_bytes

    def _is_stored(self, block: int) -> bool:
        in_saved_output = block - 1 in self._saved and self._blocks[block].splittable
        return block == 0 or block in self._inputs or in_saved_output

    def _waiting_gradient(self) -> int:
        whole = self.num_left == len(self._blocks)
        return 0 if whole else self._blocks[self.num_left - 1].output_gradient_bytes

    def _held(self, block: int) -> int:
        option = self._saved.get(block)
        return self._inputs.get(block, 0) + (0 if option is None else option.saved_bytes)

    def _count(self, seconds: float, step_bytes: int) -> None:
        held = sum(self._inputs.values()) + sum(option.saved_bytes for option in self._saved.values())
        self.seconds += seconds
        self.step_seconds.append(seconds)
        self.step_bytes.append(held + step_bytes)
