"""Checkpointed blocks under torch.compile and the ways to spread a model over ranks: the plain bits."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine import activation

WIDTH = 32
POLICIES: dict[str, dict[str, str]] = {
    "plain": {},
    "full": {"blocks.0": "recompute", "blocks.1": "recompute"},
    "budget": {"blocks.0": "recompute", "blocks.1": "recompute linked after D blocks.0"},
    "selective": {"blocks.0": "selective", "blocks.1": "selective"},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def two(policy: str) -> nn.Module:
    torch.manual_seed(0)
    return activation.apply_actions(Two(), POLICIES[policy])


def inputs(number: int) -> Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(number))


def gradients(model: nn.Module, parameters: nn.Module | None = None) -> list[Any]:
    """Of two accumulated steps, as arrays that travel between processes."""
    for number in range(2):
        model(inputs(number)).square().mean().backward()
    grads = [parameter.grad for parameter in (parameters or model).parameters()]
    return [getattr(grad, "_local_tensor", grad).numpy().copy() for grad in grads]


def assert_same(found: dict[str, list[Any]]) -> None:
    for policy, arrays in found.items():
        for one, other in zip(found["plain"], arrays, strict=True):
            assert (one == other).all(), policy


def test_compiled_models_and_compiled_parts_have_the_plain_compiled_bits() -> None:
    def whole(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="aot_eager")

    def parts(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            block.up = torch.compile(block.up, backend="aot_eager")
        return model

    for compiled in (whole, parts):
        found = {}
        for policy in ("plain", "budget"):  # which has a block of each kind that is run again
            model = two(policy)
            found[policy] = gradients(compiled(model), model)
        assert_same(found)


@dataclasses.dataclass
class Out:
    x: Tensor
    rest: dict[str, tuple[Tensor, int]]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "plain"])
def test_dataclasses_dictionaries_and_tuples_and_a_block_called_twice(policy: str) -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, given: Out) -> Out:
            (y, count), x = given.rest["y"], self.block(given.x)
            return Out(x, {"y": (self.block(y), count + 1)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Wrapping(), Wrapping()])

        def forward(self, x: Tensor) -> Tensor:
            out = Out(x, {"y": (x * 2, 0)})
            for block in (*self.blocks, self.blocks[1]):
                out = block(out)
            return out.x * out.rest["y"][0] + out.rest["y"][1]

    torch.manual_seed(0)
    plain = Model()
    changed = activation.apply_actions(copy.deepcopy(plain), POLICIES[policy])
    assert_same({"plain": gradients(plain), policy: gradients(changed)})


def _sharded_by_torch(rank: int, world_size: int) -> dict[str, list[Any]]:
    from torch.distributed.fsdp import fully_shard

    found = {}
    for policy in POLICIES:
        model = two(policy)
        for block in model.blocks:
            fully_shard(block.up)  # inside of what is run again
            fully_shard(block)
        found[policy] = gradients(fully_shard(model))
    return found


def _tensor_parallel(rank: int, world_size: int) -> dict[str, list[Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world_size,))
    styles = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    return {policy: gradients(parallelize_module(two(policy), mesh, styles)) for policy in POLICIES}


def _pipelined(rank: int, world_size: int) -> dict[str, list[Any]]:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    found = {}
    for policy in POLICIES:
        stage = PipelineStage(two(policy), rank, world_size, torch.device("cpu"))
        schedule = Schedule1F1B(stage, n_microbatches=4, loss_fn=lambda y, t: (y - t).square().mean())
        schedule.step(*([inputs(0)] if rank == 0 else []), **({"target": inputs(1)} if rank == 1 else {}))
        found[policy] = [p.grad.numpy().copy() for p in stage.submod.parameters()]
    return found


@pytest.mark.parametrize("ranks", [_sharded_by_torch, _tensor_parallel, _pipelined])
def test_every_policy_has_the_plain_bits_on_two_ranks(
    ranks: Callable[..., dict[str, list[Any]]], run_ranks: Callable[..., list[Any]]
) -> None:
    for found in run_ranks(ranks, 2):
        assert_same(found)
