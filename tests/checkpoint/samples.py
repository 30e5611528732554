"""Small checkpoint contents, and the same with other values, for the tests of this folder."""

from __future__ import annotations

import random

import torch

from mlsys_engine.checkpoint import Contents


def contents(fill: float, *, rank: int = 0, with_state: bool = True) -> Contents:
    """A two-parameter model whose every value is derived from `fill`; views of arenas included."""
    arena = torch.full((40,), fill)
    weight, bias = arena[3:15].view(4, 3), arena[20:24]
    weight += torch.arange(12.0).view(4, 3)
    state = {
        "layer.weight": {"step": torch.tensor(fill), "exp_avg": weight * 0.5},
        "layer.bias": {"step": torch.tensor(fill), "exp_avg": bias * 0.5},
    }
    return Contents(
        model={
            "layer.weight": weight,
            "layer.bias": bias,
            "norm.count": torch.tensor(int(fill)),
            "half": torch.full((5,), fill, dtype=torch.bfloat16),
            "empty": torch.zeros(0, 3),
        },
        optimizer_state=state if with_state else {},
        optimizer_groups=[
            {"lr": fill, "betas": (0.9, 0.99), "params": ["layer.weight", "layer.bias"]},
        ],
        shared={"scheduler": {}, "nested": {"values": [1, 2.5, None, "x"]}, "fill": fill},
        own={"rank": rank, "python": random.Random(rank).getstate(), "torch": torch.arange(rank + 3)},
    )


def assert_same(left: Contents, right: Contents) -> None:
    """Equal to the last bit, rank's own part included."""
    assert left.model.keys() == right.model.keys()
    for name, value in left.model.items():
        assert torch.equal(value, right.model[name]), name
        assert value.dtype == right.model[name].dtype, name
    assert left.optimizer_state.keys() == right.optimizer_state.keys()
    for name, state in left.optimizer_state.items():
        assert state.keys() == right.optimizer_state[name].keys()
        assert all(torch.equal(value, right.optimizer_state[name][key]) for key, value in state.items())
    assert left.optimizer_groups == right.optimizer_groups
    assert left.shared == right.shared
    assert left.own["rank"] == right.own["rank"]
    assert left.own["python"] == right.own["python"]
    assert torch.equal(left.own["torch"], right.own["torch"])
