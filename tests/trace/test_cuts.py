"""What crosses the cuts between blocks."""

from __future__ import annotations

import torch
from torch import nn

from mlsys_engine.trace import Crossing, Cut, trace
from tests.activation.models import Nested
from tests.trace.models import Skipping, skipping_sample


def keys(cut: Cut) -> set[str]:
    """Producers with the position of the output, or with the operation."""
    return {
        f"{each.producer}:{each.operation if each.output is None else each.output}" for each in cut.tensors
    }


class Row(nn.Module):
    """Blocks with the given code in between; `between(index, x, state)` returns what the block gets."""

    def __init__(self, before, between, after) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.code = (before, between, after)

    def forward(self, x):
        before, between, after = self.code
        state = before(x)
        for index, block in enumerate(self.blocks):
            x = block(between(index, x, state))
        return after(x, state)


def test_skips_masks_and_labels_cross_every_cut_up_to_their_last_use():
    cuts = trace(Skipping(), skipping_sample()).cuts
    assert [(cut.after, cut.before) for cut in cuts] == [
        (None, "down.0"),
        ("down.0", "down.1"),
        ("down.1", "up.0"),
        ("up.0", "up.1"),
        ("up.1", None),
    ]
    always = {"input:labels:", ":aten.bitwise_not#1", ":aten.full#1"}
    assert keys(cuts[0]) == always | {"embed:0"}
    assert keys(cuts[1]) == always | {"down.0:0"}
    # The model adds the second block's output to itself before the third block, and keeps the first one's.
    assert keys(cuts[2]) == always | {"down.0:0", ":aten.add#1"}
    # Between the blocks the first one's output is added: nothing of it is left.
    assert keys(cuts[3]) == always | {":aten.add#2"}
    assert keys(cuts[4]) == {"input:labels:", "up.1:0"}


def test_a_crossing_tells_shape_type_bytes_and_whether_a_gradient_comes_back():
    first = trace(Skipping(), skipping_sample()).cuts[0]
    assert first.tensors[1] == Crossing(
        shape=(3, 1),
        dtype=torch.bool,
        producer="",
        output=None,
        operation="aten.bitwise_not#1",
        requires_grad=False,
    )
    assert [each.num_bytes for each in first.tensors] == [24, 3, 96, 4]
    assert [each.requires_grad for each in first.tensors] == [False, False, True, False]
    assert first.num_bytes == 24 + 3 + 96 + 4


def test_a_tensor_keeps_its_key_when_a_module_around_the_blocks_returns_it_later():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(
                nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))) for _ in range(2)
            )

        def forward(self, x):
            seen = [x]
            for stage in self.stages:
                seen.append(stage(seen[-1]))
            return seen

    cuts = trace(Model(), torch.randn(2, 4)).cuts
    assert [cut.before for cut in cuts] == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", None]
    # All of `seen` is returned, so it crosses the later cuts, too.
    assert keys(cuts[2]) == {"input:0:", "stages.0.1:0"}
    assert keys(cuts[3]) == {"input:0:", "stages.0.1:0", "stages.1.0:0"}
    assert keys(cuts[4]) == {"input:0:", "stages.0.1:0", "stages.1.1:0"}


def test_a_write_in_place_makes_the_writer_the_producer_even_through_a_view():
    def write(index, x, state):
        if index == 1:
            state[:, 0] = 1.0
        return x

    model = Row(lambda x: torch.zeros(2, 4), write, lambda x, state: x + state)
    cuts = trace(model, torch.randn(2, 4)).cuts
    assert ":aten.zeros#1" in keys(cuts[1]) | keys(cuts[0])
    [state] = [each for each in cuts[2].tensors if each.producer == ""]
    assert state.operation in ("aten.fill_#1", "aten.copy_#1")
    assert state.shape == (2, 4)


def test_views_of_one_storage_are_counted_once():
    # Both halves of a 2x8 tensor, and one half again transposed.
    def halves(x):
        parts = torch.cat([x, x], dim=1).chunk(2, dim=1)
        return (*parts, parts[0].t())

    model = Row(halves, lambda index, x, state: x, lambda x, state: x + state[0] + state[1] + state[2].t())
    cut = trace(model, torch.randn(2, 4)).cuts[1]
    assert sum(each.num_bytes for each in cut.tensors) == 4 * 32
    assert cut.num_bytes == 32 + 64  # the block's output, and the one storage


def test_parameters_and_buffers_never_cross_but_what_is_computed_from_them_does():
    class Model(Row):
        def __init__(self) -> None:
            super().__init__(None, None, None)
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("offset", torch.zeros(4))

        def forward(self, x):
            scaled = self.weight * 2
            for block in self.blocks:
                x = block(x) @ self.weight + self.offset
            return x @ scaled

    cut = trace(Model(), torch.randn(2, 4)).cuts[1]
    assert keys(cut) == {":aten.mul#1", ":aten.add#1"}


def test_blocks_may_be_named_and_may_be_called_several_times():
    found = trace(Nested(), torch.randn(4, 16), blocks=["groups.0.inner.0", "groups.0.inner.1"])
    labels = ["groups.0.inner.0", "groups.0.inner.1", "groups.0.inner.0#1"]
    assert [block.label for block in found.blocks] == labels
    assert [cut.before for cut in found.cuts] == [*labels, None]
    assert keys(found.cuts[2]) == {"groups.0.inner.1:0"}
