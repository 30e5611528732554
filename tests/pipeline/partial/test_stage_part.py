"""Parts of a forward: the stages together do what the whole model does, to the bit, and refuse the rest."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline.partial import PartialForwardError, StagePart, find_units
from tests.pipeline.partial.one_process import Divided, check_equal

WIDTH = 8


class Block(nn.Module):
    """Takes and returns a dictionary; a keyword scales it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, state: dict[str, Any], *, gate: float = 1.0) -> dict[str, Any]:
        x = state["x"]
        return {"x": x + gate * self.drop(F.gelu(self.inner(self.norm(x)))), "seen": state["seen"] + 1}


class Skips(nn.Module):
    """Like a U-Net: early values are read late; a loose parameter, an early loss, one module called twice."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inp, self.token = nn.Linear(4, WIDTH), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.mix, self.out, self.aux = (nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 2))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        x = torch.cat(
            [self.token.expand(batch["x"].shape[0], -1, -1), self.inp(batch["x"]) + self.inp(-batch["x"])], 1
        )
        state: dict[str, Any] = {"x": x, "seen": 0}
        kept: list[torch.Tensor] = []
        for position, block in enumerate(self.blocks):
            if position == 2:
                state["x"] = self.mix(torch.cat([state["x"], kept[1]], -1))
            if position == 3:
                state["x"] = state["x"] + kept[0]
            state = block(state, gate=0.5 + position)
            kept.append(state["x"])
        y = state["x"][:, 0] * batch["w"][:, None]
        loss = F.cross_entropy(self.out(y), batch["y"])
        early = F.mse_loss(self.aux(kept[0].mean(1)), batch["z"])
        return {"loss": loss + 0.3 * early, "parts": (loss, early)}


def skips_batch(rows: int, tokens: int) -> dict[str, Any]:
    return {
        "batch": {
            "x": torch.randn(rows, tokens, 4, dtype=torch.float64),
            "w": torch.rand(rows, dtype=torch.float64),
            "y": torch.randint(0, 3, (rows,)),
            "z": torch.randn(rows, 2, dtype=torch.float64),
        }
    }


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_skips_loose_parameters_and_early_losses_cross(num_stages: int, dropout: float) -> None:
    batches = [skips_batch(4, 5), skips_batch(3, 7), skips_batch(4, 5)]
    model = Skips(dropout).double()
    # The early loss is computed where its value is, so in three stages and more that value's gradient is
    # the same three shares summed in another order.
    names = [name for name, _ in model.named_parameters()] if num_stages > 2 else []
    check_equal(model, batches, num_stages, inexact=names)


class Row(nn.Module):
    """Blocks in a row, with something between them."""

    def __init__(self, between: Any = None, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(blocks)
        )
        self.between = between

    def forward(self, x: torch.Tensor) -> Any:
        for position, block in enumerate(self.blocks):
            if self.between is not None:
                x = self.between(self, position, x)
            x = block(x)
        return {"loss": x.square().sum()}


def row_batch(rows: int = 5) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(rows, WIDTH, dtype=torch.float64)}


def test_buffers_are_counted_once_and_by_their_stage_alone() -> None:
    divided = check_equal(Row().double(), [row_batch(), row_batch(3), row_batch()], 2)
    first, last = divided.copies
    assert first.blocks[0][1].num_batches_tracked == 3 and first.blocks[3][1].num_batches_tracked == 0
    assert last.blocks[0][1].num_batches_tracked == 0 and last.blocks[3][1].num_batches_tracked == 3


def branch(model: Row, position: int, x: torch.Tensor) -> torch.Tensor:
    return x if position and x.mean() > 9 else x + 1


def number(model: Row, position: int, x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item() if position else x


def again(model: Row, position: int, x: torch.Tensor) -> torch.Tensor:
    return model.blocks[0](x) if position == 3 else x


def chosen(model: Row, position: int, x: torch.Tensor) -> torch.Tensor:
    return x[x[:, 0] > 0] if position == 1 else x


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (branch, "branch, .*test_stage_part.py.*__bool__ reads the numbers"),
        (number, "number, .*item reads the numbers"),
        (again, r"blocks.0 belongs to stage 0 and reads a value of stage 1"),
        (chosen, "chosen, .*has no form without its numbers"),
    ],
)
def test_what_needs_the_numbers_of_another_stage_is_refused_with_its_line(between: Any, message: str) -> None:
    model = Row(between).double()
    with pytest.raises(PartialForwardError, match=message):
        units = ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
        stages = dict(zip(units, (0, 0, 1, 1), strict=True))
        # The last stage lacks what the first one computes.
        last = StagePart(model, 1, stages, 2)
        last.run(lambda: model(**row_batch()), lambda skeleton: torch.zeros(skeleton.shape).double())


class Reports(nn.Module):
    """Blocks with a router whose output leaves them through a hook, or by an attribute."""

    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self._block() for _ in range(4))
        self.hooked = hooked

    @staticmethod
    def _block() -> nn.Module:
        block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        return block

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        seen: list[torch.Tensor] = []
        handles = [
            block[0].register_forward_hook(lambda module, args, output: seen.append(output))
            for block in self.blocks
            if self.hooked
        ]
        for block in self.blocks:
            x = block(x)
        for handle in handles:
            handle.remove()
        return {"loss": x.sum() + sum((each.square().mean() for each in seen), torch.zeros(()))}


@pytest.mark.parametrize("num_stages", [2, 4])
def test_values_that_leave_blocks_through_hooks_are_found_and_cross(num_stages: int) -> None:
    divided = check_equal(Reports(hooked=True).double(), [row_batch(), row_batch(3), row_batch()], num_stages)
    assert divided.units.escapes == tuple(f"blocks.{position}.0" for position in range(4))


def test_a_value_that_leaves_through_a_hook_the_plan_has_not_seen_is_refused() -> None:
    model = Reports(hooked=True).double()
    part = StagePart(model, 0, {f"blocks.{position}": position // 2 for position in range(4)}, 2, escapes=())
    with pytest.raises(PartialForwardError, match="left it unseen"):
        part.run(lambda: model(**row_batch()), lambda skeleton: skeleton)


def test_the_forward_is_left_after_the_last_send_and_leaves_the_model_as_it_was() -> None:
    model = Row(lambda model, position, x: (reached.append(position), x)[1]).double()
    reached: list[int] = []
    divided = Divided.evenly(model, row_batch(), 2)
    batch = row_batch()
    before = dict(divided.copies[0].blocks[0].__dict__)
    divided.train(batch)
    reached.clear()
    divided.train(batch)
    assert reached == [0, 1, 2, 0, 1, 2, 3]  # the first stage stops where block 2 reads what was sent
    assert divided.copies[0].blocks[0].__dict__.keys() == before.keys()
    first, last = divided.crossings(batch)
    assert first is not None and last is not None
    assert [form.shape for form in first.sent] == [(5, WIDTH)] == [form.shape for form in last.received]
    assert divided.crossings(row_batch(3)) == [None, None]


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor | None = None


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, pair: Pair, mask: torch.Tensor | None = None) -> tuple[Pair, torch.Tensor | None]:
        return Pair(self.inner(pair.left), pair.left), mask


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Halves() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Pair:
        pair, mask = Pair(x), x > 0
        for layer in self.layers:
            pair, mask = layer(pair, mask=mask)
            pair.left = pair.left * mask
        return pair


@pytest.mark.parametrize("grad", [True, False])
def test_dataclasses_tuples_and_no_labels_in_evaluation(grad: bool) -> None:
    model, batch = Structured().double().eval(), row_batch()
    divided = Divided.evenly(model, batch, 3)
    with torch.set_grad_enabled(grad):
        expected = model(**batch)
        for _ in range(2):
            output = divided.forward(lambda each: each(**batch), "evaluation")[-1].output
            assert torch.equal(output.left, expected.left)


def test_under_autocast_messages_have_the_type_that_the_device_computes_in() -> None:
    model, batch = Row(), {"x": torch.randn(5, WIDTH)}
    divided = Divided.evenly(model, batch, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = copy.deepcopy(model)(**batch)["loss"]
        assert torch.equal(divided.train(batch), expected.detach())


def test_finding_units_changes_neither_buffers_nor_random_numbers() -> None:
    model = Row(lambda model, position, x: F.dropout(x, 0.5)).double()
    batch = row_batch()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    units = find_units(model, batch)
    assert units.names == units.blocks == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_recompute_their_own_blocks_are_refused() -> None:
    model = Row()
    model.blocks[1].gradient_checkpointing = True
    with pytest.raises(ConfigError, match="let the engine recompute"):
        StagePart(model, 0, {"blocks.0": 0, "blocks.1": 1}, 2)
