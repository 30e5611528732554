"""The device's path of sharded optimizer state, on CPU tensors: the same bits, and the order of its calls."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from mlsys_engine import comm
from mlsys_engine.data_parallel import sharded_device
from mlsys_engine.data_parallel.sharded import check_steppable
from mlsys_engine.data_parallel.sharded_device import DeviceShardReduction, DeviceShardUpdate
from mlsys_engine.errors import ConfigError
from mlsys_engine.optim.operands import DeviceLaunch
from tests.data_parallel.models import mlp, pairs
from tests.data_parallel.sharding import (
    ADAMW,
    MOMENTUM,
    STEPS,
    Uneven,
    assert_same_state,
    groups,
    resume,
    train,
    wrap,
)


@pytest.mark.parametrize(
    ("world_size", "optimizer", "max_grad_norm"),
    [
        (2, ADAMW, 0.5),
        (3, functools.partial(groups, ADAMW), 0.5),
        (3, MOMENTUM, None),
    ],
    ids=["adamw", "groups", "momentum"],
)
def test_the_devices_path_gives_the_bits_of_unsharded_training(
    run_ranks, world_size, optimizer, max_grad_norm
):
    """With accumulation, ranks of fewer microbatches, a schedule and a step that is skipped."""
    whole = run_ranks(train, world_size, "none", optimizer, max_grad_norm)
    for results, weights, grads in run_ranks(train, world_size, "device", optimizer, max_grad_norm):
        assert str(results) == str(whole[0][0])  # nan and inf compare as text
        assert [skipped for *_, skipped in results] == [step == 7 for step in range(STEPS)]
        assert all(np.array_equal(weights[name], whole[0][1][name]) for name in weights)
        assert not grads


def test_full_state_goes_between_the_memories_without_a_change(run_ranks):
    # Only rank 0 has samples, so that the sums are the same on any number of ranks.
    state = None
    for shard, world_size in [("none", 1), ("device", 2), ("optimizer", 3), ("device", 3)]:
        ranks = run_ranks(resume, world_size, shard, state, 2)
        if state is not None:
            assert_same_state(ranks[-1], run_ranks(resume, 1, "none", state, 2)[0])
        state = ranks[0]


def _parts(rank, world_size):
    """Both memories' own state after the same steps, the second loaded from the first's parts in between."""
    states, loaded = [], None
    for shard in ("optimizer", "device", "device"):
        runner = wrap(Uneven(), shard, sample=pairs(1), max_grad_norm=0.5)
        if len(states) == 2:
            runner.load_state_dict(loaded)
        for step in range(2 if len(states) == 2 else 0, 4):
            runner.step([pairs(2, seed=10 * step + rank)])
            if step == 1 and shard == "optimizer":
                loaded = runner.state_dict()
                loaded = {"model": _copied(loaded["model"]), "optimizer": _copied(loaded["optimizer"])}
        states.append(runner.state_dict())
    return [_plain(state["optimizer"]["state"]) for state in states]


def _copied(state):
    return torch.utils._pytree.tree_map(
        lambda leaf: (
            leaf.clone()
            if isinstance(leaf, torch.Tensor)
            else type(leaf)(shape=leaf.shape, first=leaf.first, data=leaf.data.clone())
            if hasattr(leaf, "pieces")
            else leaf
        ),
        state,
    )


def _plain(state):
    return {
        (name, key): (value.first, tuple(value.shape), value.data.tolist())
        if hasattr(value, "pieces")
        else float(value)
        for name, values in state.items()
        for key, value in values.items()
    }


def test_a_ranks_own_state_is_that_of_the_arena_part_by_part_and_loads_from_it(run_ranks):
    for arena, device, resumed in run_ranks(_parts, 2):
        assert arena == device == resumed
        assert any(isinstance(value, tuple) and value[2] for value in device.values())


def _calls(rank, world_size):
    """What one step calls, in order."""
    log: list[str] = []
    runner = wrap(mlp(width=64), "device", sample=pairs(1), bucket_mib=1e-4)
    assert type(runner._reduction) is DeviceShardReduction and type(runner._update) is DeviceShardUpdate
    num_buckets = len(runner.plan.partition)

    class Side:
        def running(self):
            log.append("beside")
            return torch.no_grad()

        def wait(self):
            log.append("join")

    class Work:
        def __init__(self, work, name):
            self._work, self._name = work, name

        def wait(self):
            log.append(f"wait {self._name}")
            return self._work.wait()

    def logged(function, name):
        def call(*args, **options):
            log.append(name)
            work = function(*args, **options)
            return Work(work, name) if name in ("reduce", "share") else work

        return call

    runner._reduction._side = Side()
    runner._sum_over_data = logged(runner._sum_over_data, "statistics")
    runner._update.sum_of_squares = logged(runner._update.sum_of_squares, "norm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "reduce_shard", logged(comm.reduce_shard, "reduce"))
        patch.setattr(comm, "share_shards", logged(comm.share_shards, "share"))
        patch.setattr(DeviceLaunch, "__call__", logged(DeviceLaunch.__call__, "step"))
        patch.setattr(
            sharded_device, "squares_of_chunks", logged(sharded_device.squares_of_chunks, "squares")
        )
        runner.step([pairs(2)])
    return num_buckets, runner.reducer.num_overlapped, log


def test_buckets_are_reduced_during_backward_and_each_travels_while_the_next_is_stepped(run_ranks):
    for num_buckets, num_overlapped, log in run_ranks(_calls, 2):
        assert num_overlapped == num_buckets > 2
        reductions = ["reduce", "beside", "wait reduce", "squares"] * num_buckets
        joins = ["join"] * num_buckets  # the reducer's waits, which find nothing left to wait for
        steps = ["step", "share"] * num_buckets
        waits = ["wait share"] * num_buckets
        assert log == [*reductions, "join", "statistics", *joins, "norm", *steps, *waits]


def test_chunks_that_follow_one_another_are_one_span_until_a_short_one():
    gradients = torch.zeros(8213)
    address = gradients.data_ptr()
    rows = [(0, 4096, 7), (4096, 16, 8), (4112, 4096, 9), (8208, 5, 10)]
    expected = [[address, 4112], [address + 4 * 4112, 4101]]
    assert sharded_device._spans(rows, gradients).tolist() == expected
    assert sharded_device._spans([], gradients).shape == (0, 2)


def test_a_device_without_kernels_is_refused_with_the_way_out():
    check_steppable(torch.device("cpu"))
    with pytest.raises(ConfigError, match=r'on meta.*no kernels[\s\S]*shard="none"'):
        check_steppable(torch.device("meta"))
