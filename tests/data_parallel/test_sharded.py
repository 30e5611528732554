"""DataParallel(shard="optimizer"): the bits of training without it, from a part of the state on each rank."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from mlsys_engine import comm, optim, strategies
from mlsys_engine.data_parallel.sharded import check_shardable
from mlsys_engine.errors import ConfigError, PeerFailedError
from mlsys_engine.memory.flat_shard import FlatShard
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
    weights_of,
    wrap,
)


@pytest.mark.parametrize(
    ("world_size", "optimizer", "max_grad_norm"),
    [
        (2, ADAMW, 0.5),
        (3, ADAMW, None),
        (4, functools.partial(groups, ADAMW), 0.5),
        (2, MOMENTUM, None),
        (3, functools.partial(optim.SGD, lr=0.05), 0.5),
        (2, functools.partial(optim.Lion, lr=0.005), 0.5),
        (2, functools.partial(optim.Adagrad, lr=0.05, initial_accumulator_value=0.1), None),
    ],
    ids=["adamw", "adamw-unclipped", "groups", "momentum", "sgd", "lion", "adagrad"],
)
def test_sharded_training_gives_the_bits_of_unsharded_training(
    run_ranks, world_size, optimizer, max_grad_norm
):
    whole = run_ranks(train, world_size, "none", optimizer, max_grad_norm)
    parts = run_ranks(train, world_size, "optimizer", optimizer, max_grad_norm)
    for results, weights, grads in parts:
        # nan and inf compare as text
        assert str(results) == str(whole[0][0])
        assert all(np.array_equal(weights[name], whole[0][1][name], equal_nan=True) for name in weights)
        assert not grads
    assert [skipped for *_, skipped in parts[0][0]] == [step == 7 for step in range(STEPS)]


def _sizes(rank, world_size):
    model = Uneven()
    runner = wrap(model, "optimizer", sample=pairs(1))
    runner.step([pairs(2, seed=rank)])
    state = runner.state_dict()["optimizer"]["state"]
    held = {
        name: (values["exp_avg"].first, values["exp_avg"].end, values["exp_avg_sq"].data.numel())
        for name, values in state.items()
    }
    in_arena = all(
        comm.in_arena(memory.parameters) and comm.in_arena(memory.gradients)
        for memory in runner._arenas.buckets
    )
    return held, in_arena, len(runner.optimizer.state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_holds_its_part_of_the_moments_and_together_they_hold_all(run_ranks, world_size):
    values = run_ranks(_sizes, world_size)
    sizes = {name: p.numel() for name, p in Uneven().named_parameters() if not name.startswith("unused")}
    total = sum(sizes.values())
    for held, in_arena, others in values:
        assert in_arena and others == 0  # nothing is held beside the parts
        # A part is off the equal share by at most half a chunk of 4,096 elements for each cut of a bucket;
        # there are three buckets (0.01 MiB are less than one chunk).
        own = sum(numel for *_, numel in held.values())
        assert own <= total / world_size + 4 * 4096
        assert all(numel == end - first for first, end, numel in held.values())
    for name, numel in sizes.items():
        ranges = sorted((held[name][0], held[name][1]) for held, *_ in values if held[name][2])
        assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])][: len(ranges)]
        assert (ranges[-1][1] if ranges else 0) == numel


def test_full_state_goes_from_layout_to_layout_without_a_change(run_ranks):
    # Only rank 0 has samples, so that the sums are the same on any number of ranks.
    layouts = [("none", 1), ("optimizer", 2), ("optimizer", 4), ("none", 2), ("optimizer", 3)]
    state = None
    for shard, world_size in layouts:
        ranks = run_ranks(resume, world_size, shard, state, 3)
        for other in ranks[1:]:
            assert_same_state(other, ranks[0])
        if state is not None:
            assert_same_state(ranks[0], run_ranks(resume, 1, "none", state, 3)[0])
        state = ranks[0]


def _foreign_shard(rank, world_size):
    runner = wrap(Uneven(), "optimizer", sample=pairs(1))
    runner.step([pairs(2)])
    state = runner.state_dict()
    values = state["optimizer"]["state"]["first.weight"]
    mine = values["exp_avg"]
    values["exp_avg"] = FlatShard(shape=mine.shape, first=mine.first + 1, data=mine.data)
    try:
        runner.load_state_dict(state)
    except ValueError as error:
        return str(error)


def test_a_part_of_another_layout_is_refused_with_the_way_out(run_ranks):
    for message in run_ranks(_foreign_shard, 2):
        assert "exp_avg of first.weight holds elements" in message and "full=True" in message


@pytest.mark.parametrize("locality", ["0,0,1,1", "0,1,2,3", "0,0,0,1"])
def test_over_several_hosts_all_ranks_agree_and_stay_close_to_the_unsharded_sums(run_ranks, locality):
    env = {"MLSYS_LOCALITY": locality}
    whole = run_ranks(train, 4, "none", ADAMW, 0.5, env=env)
    parts = run_ranks(train, 4, "optimizer", ADAMW, 0.5, env=env)
    for results, weights, _ in parts:
        assert str(results) == str(parts[0][0])
        assert all(np.array_equal(weights[name], parts[0][1][name]) for name in weights)
    # Between hosts a reduce-scatter may add in another order than an all-reduce: 4 terms, so a few roundings
    # of 6e-8 in a gradient, which 20 steps of AdamW may amplify where a second moment is tiny.
    for (loss, *_), (expected, *_) in zip(parts[0][0], whole[0][0], strict=True):
        assert loss == pytest.approx(expected, rel=1e-3, nan_ok=True)


def _without_arena(rank, world_size):
    # Rank 1 fills its arena of 1 MiB, so its parameters and gradients are private; rank 0's are shared.
    held = comm.empty(260_000) if rank == 1 else None
    trained = train(rank, world_size, "optimizer", ADAMW, 0.5)
    del held
    return trained


def test_without_room_in_the_arena_the_bits_are_the_same(run_ranks):
    whole = run_ranks(train, 2, "none", ADAMW, 0.5)
    for results, weights, _ in run_ranks(_without_arena, 2, env={"MLSYS_ARENA_MIB": "1"}):
        assert str(results) == str(whole[0][0])
        assert all(np.array_equal(weights[name], whole[0][1][name]) for name in weights)


def _refused(rank, world_size):
    try:
        wrap(mlp(), "optimizer", functools.partial(torch.optim.AdamW, lr=0.1), sample=pairs(1))
    except ConfigError as error:
        return str(error)


def test_another_optimizer_is_refused_with_the_way_out(run_ranks):
    for message in run_ranks(_refused, 2):
        assert "torch's AdamW" in message and "mls.optim.AdamW" in message


def test_a_rule_that_needs_more_than_parts_of_parameters_is_refused_with_the_way_out():
    optimizer = optim.ScheduleFreeAdamW(mlp().parameters())
    with pytest.raises(ConfigError, match=r'with ScheduleFreeAdamW.*shard="none" with ScheduleFreeAdamW'):
        check_shardable(optimizer)


@pytest.mark.parametrize("narrow", [{"moments": "int8"}, {"ema": 0.9}])
def test_narrow_moments_and_averages_are_refused_with_a_sharded_optimizer(narrow: dict[str, Any]) -> None:
    optimizer = optim.AdamW([("weight", torch.nn.Parameter(torch.ones(3)))], **narrow)
    with pytest.raises(ConfigError, match=r'weight in torch\.float32[\s\S]*shard="none"'):
        check_shardable(optimizer)


def test_a_model_of_another_dtype_is_refused_when_it_is_planned():
    with pytest.raises(ConfigError, match="float64 parameters, such as"):
        strategies.plan(mlp().double(), strategies.DataParallel(shard="optimizer"), world=2)


def _alone(rank, world_size):
    model, other = mlp(), mlp()
    for trained, shard in ((model, "optimizer"), (other, "none")):
        runner = wrap(trained, shard, sample=pairs(1), max_grad_norm=1.0)
        for step in range(3):
            runner.step([pairs(4, seed=step)])
    return all(np.array_equal(value, weights_of(other)[name]) for name, value in weights_of(model).items())


def test_a_world_of_one_trains_as_ever(run_ranks):
    assert run_ranks(_alone, 1) == [True]


def _bereaved(rank, world_size, runner_steps):
    model = Uneven()
    runner = wrap(model, "optimizer", sample=pairs(1))
    for step in range(runner_steps):
        runner.step([pairs(2, seed=step)])
    if rank == 1:
        comm.poison("told to")
        return None
    try:
        for step in range(100):
            runner.step([pairs(2, seed=step)])
    except PeerFailedError as error:
        return error.rank, error.cause


def test_the_survivors_of_a_failed_rank_name_it(run_ranks):
    values = run_ranks(_bereaved, 3, 2)
    assert values[0] == values[2] == (1, "told to")
