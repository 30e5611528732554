"""Which blocks a policy chooses, and what it refuses."""

from __future__ import annotations

import pytest
from torch import nn

from mlsys_engine import activation
from mlsys_engine.errors import ConfigError
from tests.activation.models import Block, Nested, Stack


def test_members_of_a_module_list_are_the_blocks() -> None:
    assert activation.resolve(Stack(depth=3), "full") == {f"blocks.{i}": "recompute" for i in range(3)}


def test_outermost_container_wins() -> None:
    assert list(activation.resolve(Nested(), "full")) == ["groups.0", "groups.1"]


def test_sequential_of_blocks_at_the_top_is_a_container() -> None:
    assert list(activation.resolve(nn.Sequential(Block(4), Block(4)), "full")) == ["0", "1"]


def test_a_container_in_a_container_is_a_stage_of_blocks() -> None:
    stage, block = nn.Sequential(Block(4), Block(4)), nn.Sequential(nn.Linear(4, 4), Block(4))
    model = nn.Sequential(nn.Linear(4, 4), stage, block)
    assert list(activation.resolve(model, "full")) == ["1.0", "1.1", "2"]


def test_sequential_of_plain_layers_is_cut_into_segments() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    assert activation.resolve(model, "full") == {"": "recompute segments"}


def test_model_without_containers_has_its_composite_children_as_blocks() -> None:
    model = nn.Module()
    model.first, model.second, model.head = Block(4), Block(4), nn.Linear(4, 4)
    assert list(activation.resolve(model, "full")) == ["first", "second"]


def test_model_of_single_layers_is_one_block() -> None:
    assert activation.resolve(nn.Linear(4, 4), "full") == {"": "recompute"}


def test_no_policy_touches_nothing() -> None:
    assert activation.resolve(Stack(), None) == {}


def test_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError, match=r"policy='ful'.*Known policies: full, selective, or None.*Did you mean 'full'"
    ):
        activation.checkpoint(Stack(), policy="ful")


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"blocks.0": "teleport"}, "Known actions: keep, recompute"),
        ({"blocks.9": "recompute"}, "has no module of that name"),
    ],
)
def test_bad_actions_are_refused_before_anything_changes(actions: dict[str, str], message: str) -> None:
    model = Stack()
    with pytest.raises(ConfigError, match=message):
        activation.apply_actions(model, {"blocks.1": "recompute"} | actions)
    assert "forward" not in model.blocks[1].__dict__
