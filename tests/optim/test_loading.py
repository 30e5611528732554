"""State by parameter name: other orders, other groups, wrapped models, another number of shards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mlsys_engine.errors import CheckpointError
from mlsys_engine.memory.flat_arena import FlatArena, layout_slots
from mlsys_engine.memory.flat_shard import FlatShard
from mlsys_engine.optim.kernels import step_operator
from mlsys_engine.optim.shard import OptimizerShard
from tests.optim.peers import TORCH_PEERS, make_peer
from tests.optim.variants import every_variant, gradients_for, make, shardable_variants

SHAPES = {"embed": (11, 3), "layer.weight": (7, 5), "layer.bias": (7,), "head": (5,)}
NAMES = list(SHAPES)


def named(order: list[str] = NAMES) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    made = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return [(name, made[name]) for name in order]


def run(optimizer: torch.optim.Optimizer, params: list[tuple[str, nn.Parameter]], steps: range) -> None:
    for step in steps:
        for name, parameter in params:
            parameter.grad = gradients_for(parameter.shape, 1, seed=10 * step + NAMES.index(name))[0]
        optimizer.step()


def assert_same(left: list[tuple[str, nn.Parameter]], right: list[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in left:
        assert torch.equal(parameter, dict(right)[name]), name


def copied(params: list[tuple[str, nn.Parameter]], order: list[str]) -> list[tuple[str, nn.Parameter]]:
    values = dict(params)
    return [(name, nn.Parameter(values[name].detach().clone())) for name in order]


def savers() -> list[Any]:
    """(what saves, name, hyper-parameters): our optimizers, and those of torch in TORCH_PEERS."""
    return [
        pytest.param(saver, *param.values, id=f"{param.id}-{whose}")
        for param in every_variant()
        for whose, saver in (("ours", make), ("torch", make_peer))
        if saver is make or param.values[0] in TORCH_PEERS
    ]


@pytest.mark.parametrize(("saver", "name", "variant"), savers())
def test_named_parameters_in_another_order_find_their_state(
    saver: Callable[..., torch.optim.Optimizer], name: str, variant: dict[str, Any]
) -> None:
    params = named()
    saving = saver(name, params, variant)
    run(saving, params, range(3))
    twin = copied(params, NAMES)
    straight = make(name, twin, variant)
    straight.load_state_dict(copy.deepcopy(saving.state_dict()))
    shuffled = copied(params, ["head", "layer.bias", "embed", "layer.weight"])
    loaded = make(name, shuffled, {"lr": 7.0})
    loaded.load_state_dict(copy.deepcopy(saving.state_dict()))
    run(straight, twin, range(3, 6))
    run(loaded, shuffled, range(3, 6))
    assert_same(twin, shuffled)
    for group in loaded.param_groups:  # Muon makes two of one
        own = group["param_names"]
        assert own == [each for each, _ in shuffled if each in own]


def test_parameters_that_were_grouped_otherwise_take_their_options_along() -> None:
    params = named()
    saving = make("adamw", [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.25}], {})
    run(saving, params, range(2))
    others = copied(params, NAMES)
    loaded = make("adamw", [{"params": [one]} for one in reversed(others)], {"lr": 9.0})
    loaded.load_state_dict(saving.state_dict())
    assert [group["lr"] for group in loaded.param_groups] == [0.25, 0.25, 0.5, 0.5]
    together = make("adamw", copied(params, NAMES), {})
    with pytest.raises(CheckpointError, match=r"embed and layer\.bias.*different lr"):
        together.load_state_dict(saving.state_dict())


def test_names_that_are_missing_or_unknown_are_named_and_nothing_is_loaded() -> None:
    saving = make("adamw", named(), {"lr": 0.5})
    renamed = [("stem", named()[0][1]), *named()[1:]]
    loaded = make("adamw", renamed, {"lr": 0.1})
    with pytest.raises(CheckpointError, match=r"lacks stem and has the unknown embed\."):
        loaded.load_state_dict(saving.state_dict())
    fewer = make("adamw", named()[:2], {"lr": 0.1})
    with pytest.raises(CheckpointError, match=r"has the unknown layer\.bias, head\."):
        fewer.load_state_dict(saving.state_dict())
    assert loaded.param_groups[0]["lr"] == fewer.param_groups[0]["lr"] == 0.1
    saved = saving.state_dict()
    del saved["param_groups"][0]["param_names"]
    loaded.load_state_dict(saved)  # by position, as torch
    assert loaded.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_given_by_wrappers_are_the_models_own(prefix: str) -> None:
    params = named()
    saving = make("adamw", [(prefix + name, parameter) for name, parameter in params], {"lr": 0.5})
    run(saving, params, range(2))
    shuffled = copied(params, NAMES[::-1])
    loaded = make("adamw", shuffled, {})
    loaded.load_state_dict(copy.deepcopy(saving.state_dict()))
    run(saving, params, range(2, 4))
    run(loaded, shuffled, range(2, 4))
    assert_same(params, shuffled)


class Rank:
    """One of the ranks that a single process plays: its arenas, and its equal share of the moments."""

    def __init__(self, name: str, variant: dict[str, Any], rank: int, num_ranks: int) -> None:
        slots = layout_slots(list(SHAPES.items()), torch.float32)
        self.params, self.grads = FlatArena.build(slots, torch.float32), FlatArena.build(slots, torch.float32)
        self.named = [(slot.name, nn.Parameter(self.params.view(slot))) for slot in slots]
        for slot, (_, parameter), (_, value) in zip(slots, self.named, named(), strict=True):
            parameter.data.copy_(value.data)
            parameter.grad = self.grads.view(slot)
        numel = self.params.data.numel()
        length = -(-numel // num_ranks)
        self.range = min(rank * length, numel), min((rank + 1) * length, numel)
        optimizer = make(name, self.named, variant)
        self.shard = OptimizerShard(optimizer, self.params, self.grads, [self.range])

    def step(self, number: int) -> None:
        for index, (_, parameter) in enumerate(self.named):
            assert parameter.grad is not None
            parameter.grad.copy_(gradients_for(parameter.shape, 1, seed=10 * number + index)[0])
        self.shard.advance()
        table = self.shard.table()
        step_operator(table.rule)(table.segments, table.hyper, table.steps, 1.0)


def step_together(ranks: list[Rank], steps: range) -> None:
    for number in steps:
        for rank in ranks:
            rank.step(number)
        for rank in ranks:  # the all-gather
            for owner in ranks:
                first, end = owner.range
                rank.params.data[first:end] = owner.params.data[first:end]


def whole_state(ranks: list[Rank]) -> dict[str, dict[str, Any]]:
    """What a checkpoint holds: every rank's part put in its place."""
    parts = [rank.shard.state() for rank in ranks]
    whole: dict[str, dict[str, Any]] = {}
    for name, values in parts[0].items():
        whole[name] = {}
        for key, value in values.items():
            if isinstance(value, FlatShard):
                flat = torch.cat([part[name][key].data for part in parts])
                whole[name][key] = flat.view(value.shape).clone()
            else:
                whole[name][key] = value.clone()
    return whole


@pytest.mark.parametrize(
    ("before", "after"), [(3, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 3), (2, 7)))]
)
@pytest.mark.parametrize(("name", "variant"), shardable_variants())
def test_state_saved_by_some_shards_continues_on_another_number_of_them(
    name: str, variant: dict[str, Any], before: int, after: int
) -> None:
    straight = named()
    run(make(name, straight, variant), straight, range(6))
    saving = [Rank(name, variant, rank, before) for rank in range(before)]
    step_together(saving, range(3))
    loading = [Rank(name, variant, rank, after) for rank in range(after)]
    for rank in loading:
        rank.params.data.copy_(saving[0].params.data)
        rank.shard.load(whole_state(saving))
    step_together(loading, range(3, 6))
    assert_same(straight, loading[0].named)
