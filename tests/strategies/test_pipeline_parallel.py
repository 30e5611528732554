"""PipelineParallel from wrap to close: the numbers of one process, and a state that is whole."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import mlsys_engine as mls
from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline import schedules, search
from mlsys_engine.pipeline.costs import PipelineCosts, StageCosts
from mlsys_engine.pipeline.runtime.cut import cut
from mlsys_engine.plan import Plan
from tests.strategies.stacks import cross_entropy, stack, trained_alone, words

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, foreach=False)
BATCHES = [words(6, seed=1), words(7, seed=2), words(2, seed=3, length=3)]  # ragged; fewer rows than pieces


def _pipeline(model, strategy, optimizer=ADAMW, **options):
    return mls.wrap(
        model, optimizer=optimizer, loss=cross_entropy, strategy=strategy, sample=words(), **options
    )


def _same(found, expected):
    """Names of tensors that are not equal to the last bit."""
    assert list(found) == list(expected)
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def _bits(rank, world_size, names):
    different = {}
    for schedule in names:
        alone, losses = trained_alone(stack(), BATCHES, 4, ADAMW)
        runner = _pipeline(stack(), mls.PipelineParallel(2, schedule=schedule, microbatches=4))
        own = [runner.step([batch]).loss for batch in BATCHES]
        state = runner.state_dict(full=True)
        different[schedule] = [
            *(f"loss {step}" for step in range(3) if own[step] != losses[step]),
            *_same(state["model"], alone.state_dict(full=True)["model"]),
            *(
                name
                for name, moments in alone.state_dict()["optimizer"]["state"].items()
                if _same(state["optimizer"]["state"][name], moments)
            ),
        ]
        runner.close()
    return different


def test_three_steps_under_every_schedule_have_the_bits_of_one_process(run_ranks):
    names = list(schedules.SCHEDULES)
    assert run_ranks(_bits, 2, names) == [{name: [] for name in names}] * 2


def _norm_and_rest(rank, world_size):
    optimizer = functools.partial(mls.optim.AdamW, lr=0.01)
    alone, _ = trained_alone(stack(), BATCHES[:1], 4, optimizer, max_grad_norm=0.1)
    runner = _pipeline(stack(), mls.PipelineParallel(microbatches=4), optimizer, max_grad_norm=0.1)
    found = runner.step(BATCHES[:1])
    expected = trained_alone(stack(), [], 4, optimizer, max_grad_norm=0.1)[0].step([*cut(BATCHES[0], 4)])
    weights = runner.state_dict(full=True)["model"], alone.state_dict(full=True)["model"]
    evaluated = runner.evaluate(BATCHES[1]), alone.evaluate(BATCHES[1])
    logits = runner.predict(BATCHES[1]), alone.predict(BATCHES[1])
    runner.step([])  # nothing anywhere: skipped, and everything stays
    return {
        "norm": abs(float(found.grad_norm / expected.grad_norm) - 1),
        "weights": max(float((a - b).abs().max()) for a, b in zip(*map(dict.values, weights), strict=True)),
        "loss": abs(float(evaluated[0].loss_sum / evaluated[1].loss_sum) - 1),
        "count": (int(evaluated[0].count), int(evaluated[1].count)),
        "logits": float((logits[0] - logits[1]).abs().max()),
        "tokens": int(found.num_tokens),
    }


def test_norm_clipping_evaluation_and_prediction_are_those_of_the_whole_on_every_rank(run_ranks):
    for found in run_ranks(_norm_and_rest, 2):
        assert found.pop("norm") < 1e-14  # one float64 sum in another order
        # The clipped step differs by the rounding of its float32 factor, and AdamW's by lr times that.
        assert found.pop("weights") < 0.01 * 2**-20
        assert found.pop("loss") < 1e-7
        assert found.pop("logits") < 1e-5  # the serial weights' own differences, through six layers
        assert found == {"count": (35, 35), "tokens": 30}


def _held(rank, world_size):
    runner = _pipeline(stack(tied=False), mls.PipelineParallel(2, microbatches=2))
    before = copy.deepcopy(stack(tied=False).state_dict())
    here = {name for name, parameter in runner.model.named_parameters() if not parameter.is_meta}
    state = runner.state_dict()
    runner.close()
    whole = runner.model.state_dict()
    return (
        here,
        set(state["model"]),
        _same(whole, before),
        [p.requires_grad for p in runner.model.parameters()],
    )


def test_a_rank_holds_its_stage_alone_and_close_makes_the_model_whole_again(run_ranks):
    (first, first_state, *first_rest), (last, last_state, *last_rest) = run_ranks(_held, 2)
    assert first == first_state and last == last_state
    assert not first & last and first | last == set(stack(tied=False).state_dict())
    assert "words.weight" in first and "head.weight" in last
    assert first_rest == last_rest == [[], [True] * len(first | last)]


def _loaded(rank, world_size):
    alone, _ = trained_alone(stack(), BATCHES[:2], 4, ADAMW)
    saved = alone.state_dict(full=True)
    runner = _pipeline(stack(seed=1), mls.PipelineParallel(2, "zb-v", microbatches=4))
    runner.step(BATCHES[:1])
    runner.load_state_dict(saved)
    loss = runner.step(BATCHES[2:]).loss
    expected = alone.step(cut(BATCHES[2], 4)).loss
    back = trained_alone(stack(seed=2), BATCHES[:1], 4, ADAMW)[0]
    back.load_state_dict(runner.state_dict(full=True))
    states = back.state_dict(full=True), alone.state_dict(full=True)
    return bool(loss == expected), _same(states[0]["model"], states[1]["model"])


def test_a_whole_state_goes_into_a_pipeline_and_out_of_it_with_all_bits(run_ranks):
    assert run_ranks(_loaded, 2) == [(True, [])] * 2


def _batch_norm(rank, world_size):
    options = {"batch_norm": True, "tied": False}
    alone, losses = trained_alone(stack(**options), BATCHES[:2], 2, ADAMW)
    runner = _pipeline(stack(**options), mls.PipelineParallel(2, microbatches=2))
    own = [runner.step([batch]).loss for batch in BATCHES[:2]]
    different = _same(runner.state_dict(full=True)["model"], alone.state_dict(full=True)["model"])
    runner.close()
    return own == losses, different, _same(runner.model.state_dict(), alone.model.state_dict())


def test_running_statistics_are_those_of_one_process_in_the_whole_state_and_after_close(run_ranks):
    assert run_ranks(_batch_norm, 2) == [(True, [], [])] * 2


def _given(rank, world_size):
    costs = PipelineCosts(stages=(StageCosts(), StageCosts(forward_s=2.0)))
    found = search(costs, microbatches=4, tries=4, moves=4)
    _, losses = trained_alone(stack(), BATCHES[:2], 4, ADAMW)
    runner = _pipeline(stack(), mls.PipelineParallel(schedule=found, split=("blocks.3",)))
    plan = Plan.from_json(runner.plan.to_json())
    own = [runner.step([batch]).loss for batch in BATCHES[:2]]
    return own == losses, plan == runner.plan, dict(plan.stages)["blocks.2"], dict(plan.stages)["blocks.3"]


def test_a_searched_schedule_and_named_stages_train_the_same_model(run_ranks):
    assert run_ranks(_given, 2) == [(True, True, 0, 1)] * 2


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        ({"stages": 0}, 2, "whole number of at least 1"),
        ({"microbatches": 1.5}, 2, "whole number of at least 1"),
        ({"split": "blocks.1"}, 2, "names of the modules"),
        ({"split": ("blocks.9",)}, 2, r"split has 'blocks.9'"),
        ({"split": ("blocks.1", "blocks.2")}, 2, "which makes 3 stages"),
        ({"schedule": "1f1c"}, 2, "Schedules are"),
        ({"schedule": "zb-v", "stages_per_rank": 3}, 2, "This schedule has 2"),
        ({"stages": 2}, 3, r"HybridParallel\(pipeline=2"),
        ({}, 5, "4 blocks"),
    ],
)
def test_what_cannot_be_is_refused_before_any_rank_starts(options, world, message):
    with pytest.raises(ConfigError, match=message):
        mls.plan(stack(), mls.PipelineParallel(**options), words(), world=world)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"numerics": "world_invariant", "seed": 0}, "world_invariant"), ({"compile": True}, "block.compile")],
)
def test_options_that_stages_do_not_keep_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        mls.plan(stack(), mls.PipelineParallel(), words(), world=2, **options)


def test_a_plan_needs_a_sample_and_says_so():
    with pytest.raises(ConfigError, match="Give sample=batch"):
        mls.plan(stack(), mls.PipelineParallel(), world=2)


def _without_a_sample(rank, world_size):
    _, losses = trained_alone(stack(), BATCHES[:1], 4, ADAMW)
    runner = mls.wrap(
        stack(), optimizer=ADAMW, loss=cross_entropy, strategy=mls.PipelineParallel(microbatches=4)
    )
    return bool(runner.step(BATCHES[:1]).loss == losses[0])


def test_wrap_without_a_sample_plans_at_the_first_step(run_ranks):
    assert run_ranks(_without_a_sample, 2) == [True, True]
