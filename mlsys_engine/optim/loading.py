"""Loading by name: saved optimizer state finds its parameters by their FQNs when their order has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mlsys_engine.errors import CheckpointError

if TYPE_CHECKING:
    from mlsys_engine.optim.base import NativeOptimizer

Group = dict[str, Any]

# What torch's own wrappers put into a parameter's name; the parameter is the same without it.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_NOT_OPTIONS = {"params", "param_names"}


def matched_by_name(optimizer: NativeOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dictionary with its parameters in the optimizer's order and groups.

    As it is when either side has no names, or when they agree already: parameters then match by position, as
    in torch. A group takes the options of the saved groups that its parameters come from.
    """
    saved_names = _names(state_dict["param_groups"])
    own_names = _names(optimizer.param_groups)
    if saved_names is None or own_names is None:
        return state_dict
    if saved_names == own_names and _sizes(state_dict["param_groups"]) == _sizes(optimizer.param_groups):
        return state_dict
    saved, own = _plain(saved_names), _plain(own_names)
    missing, unexpected = _beyond(own, saved), _beyond(saved, own)
    if missing or unexpected:
        differences = [_listed("lacks", missing), _listed("has the unknown", unexpected)]
        raise CheckpointError(
            f"The saved optimizer state {' and '.join(filter(None, differences))}.",
            "The same parameter names are expected, in any order.",
            'Load into the model that was saved, or delete "param_names" in its groups to load by position.',
        )
    return _rearranged(optimizer.param_groups, state_dict, saved, own)


def restore_wide(optimizer: NativeOptimizer, saved: dict[str, Any]) -> None:
    """torch casts what it loads to the parameter's dtype; a narrow one's state is wider than that."""
    for group, loaded in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, index in zip(group["params"], loaded["params"], strict=True):
            if parameter.dtype is torch.float32:
                continue
            for key, value in saved["state"].get(index, {}).items():
                if key != "step" and isinstance(value, torch.Tensor) and value.dtype is not parameter.dtype:
                    optimizer.state[parameter][key] = value.to(parameter.device)


def _rearranged(
    groups: Sequence[Group], state_dict: dict[str, Any], saved: Sequence[str], own: Sequence[str]
) -> dict[str, Any]:
    identity: dict[str, tuple[Any, Group]] = {}  # name -> its id in the saved state, its saved group
    flat = [(key, group) for group in state_dict["param_groups"] for key in group["params"]]
    for name, place in zip(saved, flat, strict=True):
        identity[name] = place
    new_groups, first = [], 0
    for number, group in enumerate(groups):
        names = own[first : first + len(group["params"])]
        first += len(names)
        places = [identity[name] for name in names]
        options = _options(number, names, [place[1] for place in places], group)
        new_groups.append(
            {**options, "params": [key for key, _ in places], "param_names": list(group["param_names"])}
        )
    return {**state_dict, "param_groups": new_groups}


def _options(number: int, names: Sequence[str], sources: Sequence[Group], own: Group) -> Group:
    """The hyper-parameters of the one saved group, or of several that agree."""
    if not sources:
        return {key: value for key, value in own.items() if key not in _NOT_OPTIONS}
    options = [{key: value for key, value in source.items() if key not in _NOT_OPTIONS} for source in sources]
    for name, other in zip(names, options, strict=True):
        if not _equal(other, options[0]):
            differing = sorted(
                key for key in {*other, *options[0]} if not _equal_value(other.get(key), options[0].get(key))
            )
            raise CheckpointError(
                f"Group {number} has {names[0]} and {name}, which were saved with different "
                f"{', '.join(differing)}.",
                "Parameters of one group share their options.",
                "Group the parameters as they were when the state was saved.",
            )
    return options[0]


def _equal(left: Group, right: Group) -> bool:
    return left.keys() == right.keys() and all(_equal_value(left[key], right[key]) for key in left)


def _equal_value(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


def _names(groups: Sequence[Group]) -> list[str] | None:
    """The names of all parameters in order; None when there are some without."""
    if not all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return None
    return [name for group in groups for name in group.get("param_names", ())]


def _sizes(groups: Sequence[Group]) -> list[int]:
    return [len(group["params"]) for group in groups]


def _plain(names: Sequence[str]) -> list[str]:
    """Names without what wrappers put into them, where that leaves them distinct."""
    plain = list(names)
    for wrapper in _WRAPPERS:
        plain = [name.replace(wrapper, "") for name in plain]
    if all(name.startswith("module.") for name in plain):  # DistributedDataParallel
        plain = [name.removeprefix("module.") for name in plain]
    return plain if len(set(plain)) == len(plain) else list(names)


def _beyond(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _listed(verb: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{verb} {shown}"
