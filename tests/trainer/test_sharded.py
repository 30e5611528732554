"""Trainer with a sharded optimizer: exact resume, and checkpoints that go from any layout to any other."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mlsys_engine import checkpoint, optim, strategies
from mlsys_engine.checkpoint.safe_reading import SafeLoadPlanner, SafeReader
from mlsys_engine.memory.flat_shard import FlatShard
from tests.data_parallel.sharding import device_path
from tests.trainer import workloads
from tests.trainer.workloads import Losses, make_loader, make_trainer


def _train(rank: int, world_size: int, run_dir: str, shard: str, part: tuple[int, int]) -> dict[int, float]:
    """Losses by step; a part is the seed of the initial weights and the step to go on to."""
    losses = Losses()
    trainer = make_trainer(
        run_dir,
        losses,
        model=workloads.make_model(seed=part[0]),
        strategy=strategies.DataParallel(shard=shard, bucket_mib=1e-4),
        max_grad_norm=0.5,
    )
    trainer.fit(make_loader(), max_steps=part[1], eval_loader=make_loader(), eval_every=5, save_every=100)
    return losses.by_step


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_sharded_training_has_the_losses_of_one_that_never_stopped(run_ranks, tmp_path, world_size):
    whole = run_ranks(_train, world_size, str(tmp_path / "whole"), "none", (0, 12))
    before = run_ranks(_train, world_size, str(tmp_path / "parts"), "optimizer", (0, 7))
    # From other weights: what matters must come from the checkpoint.
    after = run_ranks(_train, world_size, str(tmp_path / "parts"), "optimizer", (1, 12))
    assert [one | other for one, other in zip(before, after, strict=True)] == whole


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(6, 1000), nn.Tanh(), nn.Linear(1000, 9), nn.Tanh(), nn.Linear(9, 1)
        )
        self.unused = nn.Linear(5, 5)
        self.cube = nn.Parameter(torch.randn(3, 700, 2) * 0.01)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs) + self.cube.sum()


def _squares(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, int]:
    return (output - batch[1]).square().sum(), output.numel()


def _leg(rank: int, world_size: int, folder: str, layout: tuple[str, str], steps: range) -> bool:
    """Goes on from the newest checkpoint for some steps and saves; whether all state was loaded in parts."""
    torch.set_num_threads(1)  # or a rank alone would cut its matrix products otherwise
    kind, shard = layout
    factory = {
        "adamw": lambda named: optim.AdamW(named, lr=0.01),
        "sgd": lambda named: optim.SGD(named, lr=0.01, momentum=0.9, dampening=0.2),
    }[kind]
    sample = (torch.zeros(1, 6), torch.zeros(1, 1))
    on_device = shard == "device"
    with device_path() if on_device else contextlib.nullcontext():
        runner = strategies.wrap(
            Net(),
            optimizer=factory,
            loss=_squares,
            strategy=strategies.DataParallel(shard="optimizer" if on_device else shard, bucket_mib=0.01),
            max_grad_norm=0.5,
            sample=sample,
        )
    parts: list[bool] = []
    newest = checkpoint.latest(Path(folder))
    if newest is not None:
        template = checkpoint.Contents.of_runner_state(
            runner.state_dict(), shared={}, own={}, place=runner.place_state
        )
        loaded = checkpoint.load(newest, template).contents
        parts = [
            isinstance(value, FlatShard)
            for state in loaded.optimizer_state.values()
            for value in state.values()
            if value.shape != torch.Size([])
        ]
        runner.load_state_dict(loaded.runner_state())
    for step in steps:
        # Rank 0 alone has samples: adding the others' zeros is exact, so the bits are those of one process.
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(5, 6, generator=generator)
        runner.step([(inputs, inputs.sum(1, keepdim=True))] if rank == 0 else [])
    contents = checkpoint.Contents.of_runner_state(runner.state_dict(), shared={}, own={})
    checkpoint.save(folder, steps.stop, contents, plan_hash="")
    return all(parts)


def _everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, whole."""
    newest = checkpoint.latest(folder)
    assert newest is not None
    reader = SafeReader(newest)
    flat = {
        key: torch.zeros(record.size, dtype=record.properties.dtype)
        for key, record in reader.read_metadata().state_dict_metadata.items()
        if isinstance(record, TensorStorageMetadata)
    }
    dcp.load(flat, storage_reader=reader, planner=SafeLoadPlanner())
    return flat


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_checkpoints_go_from_layout_to_layout_to_the_last_bit(run_ranks, tmp_path, kind):
    layouts = [
        (1, "none"),
        (2, "optimizer"),
        (4, "optimizer"),
        (2, "device"),
        (2, "none"),
        (1, "optimizer"),
        (3, "optimizer"),
    ]
    for number, (world_size, shard) in enumerate(layouts):
        steps = range(2 * number, 2 * number + 2)
        in_parts = run_ranks(_leg, world_size, str(tmp_path / "chain"), (kind, shard), steps)
        # Where state is sharded, nobody loads more than the own part.
        assert all(in_parts) == (number == 0 or (shard != "none" and world_size > 1))
    run_ranks(_leg, 1, str(tmp_path / "one"), (kind, "none"), range(2 * len(layouts)))
    chain, one = _everything(tmp_path / "chain"), _everything(tmp_path / "one")
    assert chain.keys() == one.keys()
    assert not [key for key in one if not torch.equal(chain[key], one[key])]
    assert any("cube" in key for key in one) and not any("optimizer/unused" in key for key in one)
