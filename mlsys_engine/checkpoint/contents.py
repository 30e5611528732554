"""What a checkpoint holds, and the flat keys under which torch.distributed.checkpoint stores it.

    model/<fqn>                a tensor with its global shape (shards keep their offsets)
    optimizer/<fqn>/<name>     one piece of optimizer state of one parameter
    optimizer_groups           hyper-parameters of every group, parameters by name
    shared                     the same on every rank: scheduler, data position, seed, ...
    rank/00000                 of one rank alone: its random number generators, and what a compressed
                               reduction keeps for the next step

Module names contain no slash that would matter: the first and the last part of an optimizer key are split
off.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

GROUPS_KEY = "optimizer_groups"
SHARED_KEY = "shared"
_OWN_OF_RUNNER = ("reduction",)  # what of a Runner's state belongs to one rank alone
# and what, besides model and optimizer, is the same on every rank
_SHARED_OF_RUNNER = ("accumulation", "loss_scaler", "noise_scale")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The state of a training at one step boundary."""

    model: Mapping[str, Any]  # by FQN
    optimizer_state: Mapping[str, Mapping[str, Any]]  # by FQN, then by the optimizer's own names
    optimizer_groups: list[dict[str, Any]]
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)  # this rank's
    # Of a template: where state (by FQN and name) goes that does not exist yet; None: to every rank whole.
    place: Callable[[str, str], Any | None] | None = None
    # Of a template: names of parameters and buffers that this rank has no part of, and does not read.
    elsewhere: Collection[str] = ()

    @classmethod
    def of_runner_state(
        cls,
        state: Mapping[str, Any],
        *,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        place: Callable[[str, str], Any | None] | None = None,
        elsewhere: Collection[str] = (),
    ) -> Contents:
        """From a Runner's `state_dict()` and what the trainer adds to it."""
        optimizer = state["optimizer"]
        return cls(
            model=state["model"],
            optimizer_state=optimizer["state"],
            optimizer_groups=list(optimizer["param_groups"]),
            shared={**shared, **{key: state[key] for key in _SHARED_OF_RUNNER if key in state}},
            own={**own, **{key: state[key] for key in _OWN_OF_RUNNER if key in state}},
            place=place,
            elsewhere=elsewhere,
        )

    def runner_state(self) -> dict[str, Any]:
        """What a Runner's `load_state_dict()` takes."""
        return {
            "model": dict(self.model),
            "optimizer": {
                "state": {fqn: dict(state) for fqn, state in self.optimizer_state.items()},
                "param_groups": self.optimizer_groups,
            },
            **{key: self.own[key] for key in _OWN_OF_RUNNER if key in self.own},
            **{key: self.shared[key] for key in _SHARED_OF_RUNNER if key in self.shared},
        }


def flatten(contents: Contents, rank: int) -> dict[str, Any]:
    """The flat form of `contents` as rank `rank` contributes it."""
    flat: dict[str, Any] = {f"model/{fqn}": value for fqn, value in contents.model.items()}
    for fqn, state in contents.optimizer_state.items():
        flat |= {f"optimizer/{fqn}/{name}": value for name, value in state.items()}
    flat[GROUPS_KEY] = contents.optimizer_groups
    flat[SHARED_KEY] = dict(contents.shared)
    flat[rank_key(rank)] = dict(contents.own)
    return flat


def optimizer_key(key: str) -> tuple[str, str]:
    """(fqn, name) of a key optimizer/<fqn>/<name>."""
    fqn, name = key.removeprefix("optimizer/").rsplit("/", 1)
    return fqn, name


def unflatten(flat: Mapping[str, Any], rank: int) -> Contents:
    """The inverse of flatten, for what rank `rank` has loaded."""
    optimizer_state: dict[str, dict[str, Any]] = {}
    for key in flat:
        if key.startswith("optimizer/"):
            fqn, name = optimizer_key(key)
            optimizer_state.setdefault(fqn, {})[name] = flat[key]
    return Contents(
        model={key.removeprefix("model/"): flat[key] for key in flat if key.startswith("model/")},
        optimizer_state=optimizer_state,
        optimizer_groups=flat[GROUPS_KEY],
        shared=flat[SHARED_KEY],
        own=flat.get(rank_key(rank), {}),
    )


def rank_key(rank: int) -> str:
    """The key of one rank's own state."""
    return f"rank/{rank:05d}"
