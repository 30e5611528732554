from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine import optim, strategies
from mlsys_engine.comm.launch import World
from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import Plan, Runner
from tests.data_parallel.models import mlp, pairs, squared_error

ADAMW = functools.partial(optim.AdamW, lr=0.01)


def _world(size):
    return World(
        rank=0,
        local_rank=0,
        world_size=size,
        local_size=size,
        hosts=("here",) * size,
        device=torch.device("cpu"),
        launcher="single",
        num_threads=1,
        affinity=(0,),
        backend="mlsys",
    )


@pytest.mark.parametrize(("world", "size"), [(None, 1), (1, 1), (1024, 1024), (_world(6), 6)])
def test_planning_needs_no_ranks_and_no_process_group(world, size):
    plan = strategies.plan(mlp(), "data_parallel", pairs(2)[0], world=world)
    assert plan.world_size == size and plan.order_source == "execution"
    assert not dist.is_initialized()


@pytest.mark.parametrize("world", [0, -1, True, "2", 1.5])
def test_a_world_without_ranks_is_refused(world):
    with pytest.raises(ConfigError, match="number of ranks, at least one"):
        strategies.plan(mlp(), "data_parallel", world=world)


@pytest.mark.parametrize("function", [strategies.plan, strategies.wrap])
def test_what_is_no_module_is_refused(function):
    arguments = {"strategy": strategies.DataParallel()}
    if function is strategies.wrap:
        arguments["optimizer"] = optim.AdamW
    with pytest.raises(ConfigError, match="A str was given as the model"):
        function("gpt2", **arguments)


def test_a_loss_that_is_no_function_is_refused():
    with pytest.raises(ConfigError, match="loss='mse'"):
        strategies.wrap(mlp(), optimizer=optim.AdamW, loss="mse")


def test_a_sample_with_targets_for_the_loss_function_is_traced():
    assert strategies.plan(mlp(), strategies.DataParallel(), pairs(2)).order_source == "execution"


def test_the_activation_policy_is_resolved_into_the_plan():
    model = nn.Sequential(mlp(), mlp())
    plan = strategies.plan(model, "data_parallel", activation="full")
    assert dict(plan.activation) == {"0": "recompute", "1": "recompute"}
    with pytest.raises(ConfigError):
        strategies.plan(model, "data_parallel", activation="ful")


def _alone(rank, world_size):
    model = mlp()
    runner = strategies.wrap(model, optimizer=ADAMW, loss=squared_error, sample=pairs(2), max_grad_norm=1.0)
    losses = [runner.step([pairs(4)]).loss.item() for _ in range(20)]
    return isinstance(runner, Runner), runner.data_rank, runner.num_data_shards, losses[-1] < losses[0]


def test_a_world_of_one_trains(run_ranks):
    assert run_ranks(_alone, 1) == [(True, 0, 1, True)]


def _plan_in_steps(rank, world_size):
    """plan, JSON, apply; and wrap with and without a sample: the same training."""
    results = []
    for way in ("apply", "sample", "lazy"):
        model = mlp()
        if way == "apply":
            plan = strategies.plan(model, strategies.DataParallel(), pairs(2))
            plan = Plan.from_json(plan.to_json())
            runner = strategies.apply(plan, model, optimizer=ADAMW, loss=squared_error)
        else:
            sample = pairs(2) if way == "sample" else None
            runner = strategies.wrap(model, optimizer=ADAMW, loss=squared_error, sample=sample)
        results.append([runner.step([pairs(2, seed=10 * step + rank)]).loss.item() for step in range(3)])
    return results


def test_apply_wrap_and_a_late_wrap_train_alike(run_ranks):
    for results in run_ranks(_plan_in_steps, 2):
        assert results[0] == results[1] == results[2]


def _asked_before_the_first_step(rank, world_size):
    model = mlp()
    runner = strategies.wrap(model, optimizer=ADAMW, loss=squared_error)
    scheduler = torch.optim.lr_scheduler.StepLR(runner.optimizer, step_size=1, gamma=0.5)
    runner.step([pairs(2, seed=rank)])
    scheduler.step()
    state = runner.state_dict(full=True)
    runner.load_state_dict(state)
    return runner.built().plan.order_source, scheduler.get_last_lr(), runner.data_rank, runner.num_data_shards


def test_a_late_wrap_builds_when_the_optimizer_is_asked_for(run_ranks):
    values = run_ranks(_asked_before_the_first_step, 2)
    assert values == [("registration: no sample was given", [0.005], rank, 2) for rank in range(2)]


def _refusals(rank, world_size):
    messages = []

    def attempt(call):
        try:
            call()
        except ConfigError as error:
            messages.append(str(error))

    model = mlp()
    other_world = strategies.plan(model, strategies.DataParallel(), world=world_size + 1)
    attempt(lambda: strategies.apply(other_world, model, optimizer=ADAMW))
    uneven = strategies.plan(model, strategies.DataParallel(bucket_mib=25 - rank))
    mine = Plan.from_json(json.dumps(json.loads(uneven.to_json()) | {"seed": rank}))
    attempt(lambda: strategies.apply(mine, model, optimizer=ADAMW))
    attempt(lambda: strategies.wrap(model, optimizer=ADAMW, precision="fp8"))
    attempt(lambda: strategies.wrap(model, optimizer=ADAMW, strategy="auto"))
    strategies.wrap(model, optimizer=ADAMW, sample=pairs(2))  # and none of these has touched the model
    return messages


def test_plans_for_another_world_or_unlike_those_of_other_ranks_are_refused_on_every_rank(run_ranks):
    for messages in run_ranks(_refusals, 2):
        expected = [
            "A plan for 3 ranks",
            "Rank 1 has another plan",
            "precision='fp8'",
            "'auto'",
        ]
        assert len(messages) == len(expected)
        assert all(part in message for part, message in zip(expected, messages, strict=True))


def _compiled(rank, world_size):
    losses = []
    for compile in (False, True):
        runner = strategies.wrap(
            mlp(), optimizer=ADAMW, loss=squared_error, sample=pairs(2), compile=compile, activation=None
        )
        losses.append([runner.step([pairs(2, seed=10 * step + rank)]).loss.item() for step in range(5)])
    return losses


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_plain_one(run_ranks):
    for plain, compiled in run_ranks(_compiled, 2, timeout_s=300):
        # Fused kernels round differently, a few units in the last place each step.
        assert compiled == pytest.approx(plain, rel=1e-4)
