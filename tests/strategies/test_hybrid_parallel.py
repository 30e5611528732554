"""HybridParallel: data times pipeline, with the numbers of one process and a state for any other layout."""

from __future__ import annotations

import functools

import pytest
import torch

import mlsys_engine as mls
from mlsys_engine.errors import ConfigError
from tests.data_parallel.models import alone
from tests.strategies.stacks import cross_entropy, stack, words

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAMW = functools.partial(mls.optim.AdamW, lr=0.01)
STEPS = [
    [words(6, seed=2 * step), words(5, seed=2 * step + 1)] for step in range(3)
]  # one for each data rank


def _trained(model, strategy, optimizer, **options):
    runner = mls.wrap(
        model, optimizer=optimizer, loss=cross_entropy, strategy=strategy, sample=words(), **options
    )
    losses = [float(runner.step([step[runner.data_rank]]).loss) for step in STEPS]
    return runner, losses


def _largest(found, expected):
    assert list(found) == list(expected)
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def _float64(rank, world_size, schedule):
    single = alone(stack().double(), optimizer=SGD, loss=cross_entropy, max_grad_norm=0.5)
    expected = [float(single.step(step).loss) for step in STEPS]
    strategy = mls.HybridParallel(data=2, pipeline=mls.PipelineParallel(2, schedule, microbatches=3))
    runner, losses = _trained(stack().double(), strategy, SGD, max_grad_norm=0.5)
    loss = max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
    state, whole = runner.state_dict(full=True), single.state_dict(full=True)
    moments = {n: s["momentum_buffer"] for n, s in state["optimizer"]["state"].items()}
    wanted = {n: s["momentum_buffer"] for n, s in whole["optimizer"]["state"].items()}
    return loss, _largest(state["model"], whole["model"]), _largest(moments, wanted), runner.data_rank


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_four_ranks_in_float64_train_as_one_process_does(run_ranks, schedule):
    results = run_ranks(_float64, 4, schedule)
    for loss, weights, moments, _ in results:
        # Sums of a few hundred terms in other orders: some hundred roundings of 2**-53.
        assert max(loss, weights, moments) < 1e-13
    assert [data_rank for *_, data_rank in results] == [0, 1, 0, 1]


def _sharded(rank, world_size):
    states, losses = [], []
    for shard in ("none", "optimizer"):
        strategy = mls.HybridParallel(data=mls.DataParallel(shard=shard), pipeline=2)
        runner, own = _trained(stack(), strategy, ADAMW, max_grad_norm=0.5)
        states.append(runner.state_dict(full=True))
        losses.append(own)
    other = mls.wrap(stack(seed=5), optimizer=ADAMW, loss=cross_entropy, strategy=strategy, sample=words())
    other.load_state_dict(states[0])
    states.append(other.state_dict(full=True))
    moments = [
        {
            f"{name}/{key}": value
            for name, own in state["optimizer"]["state"].items()
            for key, value in own.items()
        }
        for state in states
    ]
    return losses[0] == losses[1], [
        [name for name in first if not torch.equal(torch.as_tensor(first[name]), torch.as_tensor(each[name]))]
        for group in ([state["model"] for state in states], moments)
        for first in group[:1]
        for each in group[1:]
    ]


def test_a_sharded_data_axis_under_a_pipeline_has_the_bits_of_a_replicated_one(run_ranks):
    assert run_ranks(_sharded, 4) == [(True, [[], [], [], []])] * 4


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        ({"data": 2, "pipeline": 2}, 6, "The product of the axes"),
        ({"pipeline": 3}, 4, "The product of the axes"),
        ({"data": 0}, 4, "at least 1"),
        ({"pipeline": "2"}, 4, "at least 1"),
        ({"data": 2, "pipeline": mls.PipelineParallel()}, 4, "has to be told"),
    ],
)
def test_axes_that_do_not_make_the_world_are_refused(options, world, message):
    with pytest.raises(ConfigError, match=message):
        mls.plan(stack(), mls.HybridParallel(**options), words(), world=world)


def test_the_plan_names_axes_stages_and_one_bucket_for_the_tied_weight():
    plan = mls.plan(stack(), mls.HybridParallel(data=3, pipeline=2), words(), world=6)
    assert [(axis.name, axis.size) for axis in plan.mesh] == [("pipeline", 2), ("data", 3)]
    assert [slot.name for slot in plan.buckets[-1].slots] == ["words.weight"]
    assert dict(plan.algorithms)["tied_gradients words.weight"] == "in_order"
    assert "schedule 1f1b, 4 microbatches a batch" in str(plan)


def test_without_a_pipeline_it_is_data_parallelism():
    plan = mls.plan(stack(), mls.HybridParallel(data=2), words(), world=2)
    assert plan.buckets == mls.plan(stack(), mls.DataParallel(), words(), world=2).buckets
