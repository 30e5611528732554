"""The action of a block in words: what it keeps, and which blocks are run again before its backward.

    recompute                                 keeps its input; is run again alone
    recompute linked after C blocks.3 D blocks.4
                                              keeps nothing; before its backward blocks.3 is run (what it
                                              is given stays), then blocks.4 (nothing stays), then itself
    recompute with selective                  when it is run again the option decides what stays

Letters: D nothing stays, C the inputs stay, K everything that the block saves stays.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlsys_engine.activation.blocks import KEEP, RECOMPUTE
from mlsys_engine.activation.chain import BACKWARD, CHECKPOINT, DROP, OPTION, Schedule, Step
from mlsys_engine.activation.options import OPTIONS
from mlsys_engine.errors import ConfigError
from mlsys_engine.native import load_activation

_KEEPS = {"D": "nothing", "C": "inputs", "K": "saved"}
_LETTERS = {DROP: "D", CHECKPOINT: "C", OPTION: "K"}


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """An action of the recompute kind, taken apart."""

    linked: bool  # the block keeps no input of its own
    before: tuple[tuple[str, str], ...]  # (letter, block): what is run before its backward
    option: str = KEEP  # what stays of the run before the backward

    @property
    def is_alone(self) -> bool:
        """Whether it is run from its own input, without others."""
        return not self.linked and not self.before

    def __str__(self) -> str:
        after = "".join(f" {letter} {name}" for letter, name in self.before)
        option = "" if self.option == KEEP else f" with {self.option}"
        return RECOMPUTE + (" linked" if self.linked else "") + (f" after{after}" if after else "") + option


def parse(action: str) -> Rerun | None:
    """The action taken apart; None when it is not of the recompute kind."""
    words = action.split(" ")
    if words[0] != RECOMPUTE:
        return None
    rest, option = words[1:], KEEP
    linked = rest[:1] == ["linked"]
    rest = rest[linked:]
    if rest[-2:-1] == ["with"]:
        rest, option = rest[:-2], rest[-1]
    if option != KEEP and option not in OPTIONS:
        return None
    if not rest:
        return Rerun(linked=linked, before=(), option=option)
    names = rest[2::2]
    letters = rest[1::2]
    if rest[0] != "after" or len(letters) != len(names) or not set(letters) <= _KEEPS.keys():
        return None
    return Rerun(linked=linked, before=tuple(zip(letters, names, strict=True)), option=option)


def actions_of(schedule: Schedule, names: Sequence[str]) -> dict[str, str]:
    """Each block's action, for blocks in execution order.

    The schedule may have an entry more than there are names: what follows the blocks and is always kept.
    """
    first: dict[int, Step] = {}
    before: dict[int, list[Step]] = {}
    waiting: list[Step] = []
    for step in schedule.steps:
        if step.action == BACKWARD:
            before[step.block], waiting = waiting, []
        elif step.block not in first:
            first[step.block] = step
        else:
            waiting.append(step)
    actions, last = {}, schedule.options_of_last_forwards()
    for position, name in enumerate(names):
        step = first[position]
        if step.action != OPTION:
            runs = tuple((_LETTERS[run.action], names[run.block]) for run in before[position][:-1])
            actions[name] = str(Rerun(linked=step.action == DROP, before=runs, option=last[position]))
        else:
            actions[name] = str(step.option)
    return actions


class BlockChain:
    """The blocks of a model that are run again, as one native chain. Copies and pickles with the model."""

    def __init__(self, reruns: Mapping[str, Rerun]) -> None:
        """Blocks in execution order. Raises ConfigError for an action that names a block without one."""
        for name, rerun in reruns.items():
            for _, other in rerun.before:
                if other not in reruns:
                    raise ConfigError(
                        f"The activation action of {name!r} runs {other!r} again.",
                        "Only blocks that are recomputed can be run before others.",
                        "Make the plan again for this model.",
                    )
        self._positions = {name: position for position, name in enumerate(reruns)}
        self._linked = [rerun.linked for rerun in reruns.values()]
        self._before = [
            [
                *((self._positions[other], _KEEPS[letter]) for letter, other in rerun.before),
                (position, _KEEPS["K"]),
            ]
            for position, rerun in enumerate(reruns.values())
        ]
        self._native = threading.local()

    def position(self, name: str) -> int:
        return self._positions[name]

    def native(self) -> Any:
        """The native chain, one for each thread: forwards of different threads are not linked."""
        found = getattr(self._native, "chain", None)
        if found is None:
            found = self._native.chain = load_activation().FrameChain(self._linked, self._before)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_native"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._native = threading.local()
