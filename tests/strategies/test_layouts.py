"""A checkpoint saved under one layout loads under any other, and all of its bits are there."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

import mlsys_engine as mls
from mlsys_engine import checkpoint
from tests.strategies.stacks import cross_entropy, stack, words

ADAMW = functools.partial(mls.optim.AdamW, lr=0.01)
SHARDED = mls.DataParallel(shard="optimizer", bucket_mib=0.004)
LAYOUTS = {
    "alone": (1, mls.DataParallel()),
    "data": (2, mls.DataParallel()),
    "sharded": (3, SHARDED),
    "pipeline": (2, mls.PipelineParallel(2)),
    "pipeline-v": (2, mls.PipelineParallel(2, "zb-v")),
    "deep-pipeline": (4, mls.PipelineParallel(4, "zb-h1")),
    "hybrid": (4, mls.HybridParallel(data=2, pipeline=2)),
    "sharded-hybrid": (4, mls.HybridParallel(data=SHARDED, pipeline=2)),
    "model": (2, mls.ModelParallel()),
    "sharded-model": (4, mls.HybridParallel(data=SHARDED, model=2)),
    "all": (8, mls.HybridParallel(data=2, pipeline=2, model=2)),
}


def _runner(layout, seed):
    model = stack(seed, batch_norm=True)
    return mls.wrap(
        model, optimizer=ADAMW, loss=cross_entropy, strategy=LAYOUTS[layout][1], sample=words(), accumulate=2
    )


def _whole(runner):
    """The bytes of every gathered tensor by one key each, and the groups."""
    state = runner.state_dict(full=True)
    moments = {
        f"{name}/{key}": torch.as_tensor(value)
        for name, own in state["optimizer"]["state"].items()
        for key, value in own.items()
    }
    groups = [(group["lr"], tuple(group["params"])) for group in state["optimizer"]["param_groups"]]
    tensors = {**state["model"], **moments}
    return {name: (tuple(value.shape), value.numpy().tobytes()) for name, value in tensors.items()}, groups


def _save(rank, world_size, layout, folder):
    runner = _runner(layout, seed=0)
    for step in range(2):
        runner.step([words(4, seed=2 * step), words(5, seed=2 * step + 1)])
    contents = checkpoint.Contents.of_runner_state(
        runner.state_dict(full=runner.holds_parts), shared={}, own={}
    )
    checkpoint.save(folder, 2, contents, plan_hash=runner.plan.hash)
    return _whole(runner)


def _load(rank, world_size, layout, folders):
    """What a runner of this layout has gathered after loading each checkpoint; and that it trains on."""
    runner, found = _runner(layout, seed=1), []
    elsewhere = () if runner.holds_parts else runner.elsewhere
    for folder in folders:
        template = checkpoint.Contents.of_runner_state(
            runner.state_dict(full=runner.holds_parts),
            shared={},
            own={},
            place=None if runner.holds_parts else runner.place_state,
            elsewhere=elsewhere,
        )
        newest = checkpoint.latest(Path(folder))
        assert newest is not None
        loaded = checkpoint.load(newest, template).contents
        assert not set(loaded.model) & set(elsewhere)
        runner.load_state_dict(loaded.runner_state())
        found.append(_whole(runner))
        assert torch.isfinite(runner.step([words(4, seed=9)]).loss)
    return found if rank == 0 else [True for _ in found]


def _check(run_ranks, tmp_path, savers, loaders):
    saved = {}
    for layout in savers:
        world = LAYOUTS[layout][0]
        results = run_ranks(_save, world, layout, str(tmp_path / layout))
        saved[layout] = results[0]
        assert all(result == results[0] for result in results)
    for layout in loaders:
        found = run_ranks(_load, LAYOUTS[layout][0], layout, [str(tmp_path / saver) for saver in savers])[0]
        for saver, (tensors, groups) in zip(savers, found, strict=True):
            expected, expected_groups = saved[saver]
            assert groups == expected_groups and tensors.keys() == expected.keys()
            different = [name for name in expected if tensors[name] != expected[name]]
            assert not different, f"{saver} into {layout}: {different[:3]}"


def test_what_two_hybrids_save_loads_into_cut_weights_and_into_a_pipeline(run_ranks, tmp_path):
    _check(run_ranks, tmp_path, ["sharded-hybrid", "sharded-model"], ["model", "pipeline"])


@pytest.mark.slow
def test_every_layout_loads_into_every_other(run_ranks, tmp_path):
    _check(run_ranks, tmp_path, list(LAYOUTS), list(LAYOUTS))
