"""State dictionaries by parameter name: what a checkpoint stores and any other layout can load."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mlsys_engine.errors import CheckpointError
from mlsys_engine.optim.storage import to_bfloat16_away
from mlsys_engine.trace import inventory


def model_state(model: nn.Module, full: bool, elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """The module's own state dictionary, buffers and tied names included, names `elsewhere` left out.

    Its tensors are the live ones; with `full`, private copies on the CPU (tied names share theirs).
    """
    state = {name: value for name, value in model.state_dict().items() if name not in elsewhere}
    return copied(state) if full else state


def load_model_state(model: nn.Module, state: Mapping[str, Any], elsewhere: Collection[str] = ()) -> None:
    """Copies `state` into the model in place. One of a tied parameter's names is enough.

    Names `elsewhere` are not this rank's, and neither read nor needed. Raises CheckpointError before anything
    is changed when names or shapes do not fit.
    """
    own = {name: value for name, value in model.state_dict().items() if name not in elsewhere}
    state = {name: value for name, value in state.items() if name not in elsewhere}
    for alias, canonical in inventory.ties(model).items():
        for name, other in ((alias, canonical), (canonical, alias)):
            if name in own and name not in state and other in state:
                state[name] = state[other]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unexpected:
        raise CheckpointError(
            f"A state dictionary{_named(' without', missing)}{_named(' with unexpected', unexpected)}.",
            f"It should hold exactly the {len(own)} names of {type(model).__name__}.",
            "Load a checkpoint of this model, or build the model that the checkpoint is of.",
        )
    for name, value in own.items():
        if isinstance(value, torch.Tensor) and value.shape != state[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(state[name].shape)} in the state dictionary.",
                f"The model's has shape {tuple(value.shape)}.",
                "Load a checkpoint of this model, or build the model with the checkpoint's sizes.",
            )
    # In place, and through the modules' own hooks; values that are no tensors (extra state) go the same way.
    model.load_state_dict(state, strict=False)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, full: bool) -> dict[str, Any]:
    """`{"state": {fqn: {name: value}}, "param_groups": [{..., "params": [fqn, ...]}]}`."""
    packed = optimizer.state_dict()
    names = _packed_names(optimizer, packed, model)
    state = {names[index]: dict(values) for index, values in packed["state"].items()}
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        | {"params": [names[index] for index in group["params"]]}
        for group in packed["param_groups"]
    ]
    return {"state": copied(state) if full else state, "param_groups": groups}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]
) -> None:
    """Gives the optimizer the state that `optimizer_state` returned; groups must hold the same parameters."""
    check_names(optimizer, model, state["state"])
    packed = optimizer.state_dict()
    names = _packed_names(optimizer, packed, model)
    indices = {name: index for index, name in names.items()}
    own_groups = [[names[index] for index in group["params"]] for group in packed["param_groups"]]
    groups = [list(group["params"]) for group in state["param_groups"]]
    if [set(group) for group in groups] != [set(group) for group in own_groups]:
        raise CheckpointError(
            f"An optimizer state with parameter groups of {[len(group) for group in groups]} parameters.",
            f"This optimizer has groups of {[len(group) for group in own_groups]}, with equal names in each.",
            "Build the optimizer with the parameter groups of the checkpoint.",
        )
    loaded_groups = [
        {key: value for key, value in saved.items() if key != "params"}
        | {key: group[key] for key in ("params", "param_names") if key in group}
        for saved, group in zip(state["param_groups"], packed["param_groups"], strict=True)
    ]
    # Cloned, because torch's optimizers keep the tensors they are given and step them in place.
    values = {indices[name]: _cloned(dict(value)) for name, value in state["state"].items()}
    optimizer.load_state_dict({"state": values, "param_groups": loaded_groups})


@torch.no_grad()
def restore_masters(model: nn.Module, optimizer_state: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives float32 parameters the bits that a training in half precision has kept beside them.

    The model has been loaded. A weight that is not the rounding of its master was written by somebody else,
    and stays.
    """
    for name, parameter in model.named_parameters():
        master = optimizer_state.get(name, {}).get("master")
        if not isinstance(master, torch.Tensor) or parameter.dtype is not torch.float32:
            continue
        master = master.to(parameter.device)
        roundings = (to_bfloat16_away(master), master.bfloat16(), master.half())
        is_own = torch.stack([rounded.float() == parameter for rounded in roundings]).any(0)
        parameter.copy_(torch.where(is_own, master, parameter))


def check_names(optimizer: torch.optim.Optimizer, model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raises CheckpointError for state by names that are not those of the optimizer's parameters."""
    known = set(_packed_names(optimizer, optimizer.state_dict(), model).values())
    if unexpected := state.keys() - known:
        raise CheckpointError(
            f"An optimizer state{_named(' with unexpected', unexpected)}.",
            "Its names are those of this optimizer's parameters.",
            "Load a checkpoint of this model.",
        )


def _packed_names(
    optimizer: torch.optim.Optimizer, packed: Mapping[str, Any], model: nn.Module
) -> dict[int, str]:
    """The FQN of each index in the optimizer's own (packed) state dictionary."""
    fqns = {parameter: fqn for fqn, parameter in model.named_parameters()}
    return {
        index: fqns[parameter]
        for group, packed_group in zip(optimizer.param_groups, packed["param_groups"], strict=True)
        for parameter, index in zip(group["params"], packed_group["params"], strict=True)
    }


def copied(tree: Any) -> Any:
    """The tree with private copies on the CPU in place of its tensors; those that share memory still do."""
    copies: dict[tuple[int, torch.Size, torch.dtype], torch.Tensor] = {}

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        key = (leaf.data_ptr(), leaf.shape, leaf.dtype)
        if key not in copies or not leaf.numel():
            copies[key] = leaf.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map(copy, tree)


def _cloned(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


def _named(title: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{title} {shown}{more}" if names else ""
