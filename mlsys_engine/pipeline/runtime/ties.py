"""Parameters that several stages share, such as an embedding that is also the output layer.

Its first stage owns a tied parameter, and every stage that uses it has a copy. How gradients come together is
the plan's choice for each parameter. "in_order": with every microbatch a stage sends its share back, as the
first term of the sum of the stage before: the order of one process, hence its bits. "summed": each stage adds
up its own, and the owner adds those of the stages once a step, which differs in the last bits but sends less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mlsys_engine.errors import ConfigError

IN_ORDER, SUMMED = "in_order", "summed"
ALGORITHM = "tied_gradients"  # of Plan.algorithms, followed by a space and the parameter's name
MOST_IN_ORDER_BYTES = 16 << 20  # sent once a microbatch; larger ones once a step


@dataclass(frozen=True)
class Tie:
    """One parameter and its names on each stage that uses it."""

    name: str  # the first, by which the plan knows it
    fqns: tuple[tuple[int, tuple[str, ...]], ...]  # by stage, ascending

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(stage for stage, _ in self.fqns)

    @property
    def owner(self) -> int:
        return self.fqns[0][0]

    def names(self, stage: int) -> tuple[str, ...]:
        """Its names on a stage; none where the stage does not use it."""
        return dict(self.fqns).get(stage, ())


def stage_of(name: str, stages: Mapping[str, int]) -> int:
    """The stage of the unit that a parameter or module belongs to; outside of all units it is the first."""
    while name:
        if name in stages:
            return stages[name]
        name = name.rpartition(".")[0]
    return 0


def find_ties(model: nn.Module, stages: Mapping[str, int]) -> tuple[Tie, ...]:
    """The trainable parameters of a whole model that units of several stages use."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    ties = []
    for own in names.values():
        by_stage: dict[int, list[str]] = {}
        for name in own:
            by_stage.setdefault(stage_of(name, stages), []).append(name)
        if len(by_stage) > 1:
            ties.append(Tie(own[0], tuple((stage, tuple(by_stage[stage])) for stage in sorted(by_stage))))
    return tuple(ties)


def choices(model: nn.Module, ties: Sequence[Tie], numerics: str) -> tuple[tuple[str, str], ...]:
    """For Plan.algorithms: how the gradients of each come together."""
    found = []
    for tie in ties:
        parameter = model.get_parameter(tie.name)
        small = parameter.numel() * parameter.element_size() <= MOST_IN_ORDER_BYTES
        in_order = small or numerics == "reproducible"
        found.append((f"{ALGORITHM} {tie.name}", IN_ORDER if in_order else SUMMED))
    return tuple(found)


def chosen(algorithms: Mapping[str, str], tie: Tie) -> str:
    """The plan's choice for one."""
    choice = algorithms.get(f"{ALGORITHM} {tie.name}")
    if choice not in (IN_ORDER, SUMMED):
        raise ConfigError(
            f"A plan with the choice {choice!r} for the gradients of {tie.name}, which the stages "
            f"{', '.join(map(str, tie.stages))} share.",
            f"It is {IN_ORDER!r} or {SUMMED!r}.",
            "Make the plan from this model with mls.plan.",
        )
    return choice
