"""Which blocks are alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.trace import block_names, trace
from tests.activation.test_selective import ResNet


class Layer(nn.Module):
    def __init__(self, width: int, window: int | None = None) -> None:
        super().__init__()
        self.linear, self.window = nn.Linear(width, width), window

    def forward(self, x):
        return self.linear(x if self.window is None else x.roll(self.window, 0))


def activations() -> torch.Tensor:
    """An input that wants a gradient, as those of the blocks after the first do."""
    return torch.randn(2, 4, requires_grad=True)


def test_blocks_of_equal_structure_and_shapes_are_one_kind():
    model = nn.Sequential(Layer(4), Layer(4), Layer(4))
    assert trace(model, activations()).repeated_blocks() == (("0", "1", "2"),)
    # An input that wants no gradient makes the first one's backward cheaper.
    assert trace(model, torch.randn(2, 4)).repeated_blocks() == (("0",), ("1", "2"))


def test_blocks_that_run_other_operations_are_of_another_kind_although_they_print_alike():
    # As in models that alternate between two kinds of attention.
    model = nn.Sequential(Layer(4), Layer(4, window=1), Layer(4), Layer(4, window=2))
    assert trace(model, activations()).repeated_blocks() == (("0", "2"), ("1", "3"))
    # Without a sample there is only the structure to go by.
    assert trace(model).repeated_blocks() == (("0", "1", "2", "3"),)


def test_frozen_and_evaluating_blocks_are_kinds_of_their_own():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)) for _ in range(4)))
    model[1].requires_grad_(False)
    model[2].eval()
    assert trace(model, activations()).repeated_blocks() == (("0", "3"), ("1",), ("2",))
    assert trace(model).repeated_blocks() == (("0", "3"), ("1",), ("2",))


def test_blocks_of_a_residual_network_are_alike_where_their_shapes_are():
    found = trace(ResNet(), torch.randn(2, 3, 16, 16))
    for group in found.repeated_blocks():
        shapes = {found.calls_of(label)[0].outputs for label in group}
        assert len(shapes) == 1
    assert [block.label for block in found.blocks] == block_names(ResNet())


def test_plain_layers_are_the_blocks_of_a_model_without_composite_ones():
    assert block_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ["0", "1"]
    model = nn.Module()
    model.layers, model.head = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]), nn.Linear(2, 1)
    assert block_names(model) == ["layers.0", "layers.1", "head"]


def test_a_block_that_does_not_exist_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="linear"):
        trace(nn.Sequential(Layer(4)), torch.randn(2, 4), blocks=["0.linaer"])
