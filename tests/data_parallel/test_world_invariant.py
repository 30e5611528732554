"""numerics="world_invariant": the same bits at any number of ranks, on any layout of hosts."""

from __future__ import annotations

import functools
import hashlib

import pytest
import torch
from torch import nn

from mlsys_engine import optim, strategies
from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.models import GPT, GPTConfig
from mlsys_engine.strategies import DataParallel, PlanOptions
from mlsys_engine.strategies.base import Subject
from tests.data_parallel.models import mlp, pairs, squared_error
from tests.support import ranks

ADAMW = functools.partial(optim.AdamW, lr=3e-3, weight_decay=0.1)
LEAVES, STEPS = 8, 20
CONFIG = GPTConfig(vocab_size=64, context_length=16, num_layers=2, num_heads=2, width=32, dropout=0.2)


def _leaf(step, leaf):
    """Leaves are of unequal size, with unequal numbers of counted labels, and one counts nothing."""
    generator = torch.Generator().manual_seed(1000 * step + leaf)
    tokens = torch.randint(0, 64, (1 + leaf % 3, 16), generator=generator)
    labels = tokens.clone()
    labels[:, : leaf + 1] = -100
    if leaf == 5:
        labels[:] = -100
    return {"input_ids": tokens, "labels": labels}


def _runner(numerics="world_invariant", **settings):
    torch.manual_seed(7)
    return strategies.wrap(
        GPT(CONFIG),
        optimizer=ADAMW,
        strategy=DataParallel(bucket_mib=0.02, **settings),
        max_grad_norm=0.5,
        numerics=numerics,
        sample=_leaf(0, 0),
        seed=11,
    )


def _hash(runner):
    digest = hashlib.sha256()
    for name, tensor in runner.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _steps(rank, world_size, runner, steps):
    each = LEAVES // world_size
    results = []
    for step in steps:
        batches = [_leaf(step, leaf) for leaf in range(rank * each, (rank + 1) * each)]
        # The last step is short: the last three leaves do not exist, on whichever rank they would be.
        if step == STEPS - 1:
            batches = batches[: max(0, LEAVES - 3 - rank * each)]
        result = runner.step(batches)
        results.append((result.loss.item(), result.grad_norm.item(), result.num_tokens.item()))
    return results


def _train(rank, world_size):
    runner = _runner()
    return _steps(rank, world_size, runner, range(STEPS)), _hash(runner)


@pytest.fixture(scope="module")
def alone():
    """Losses, norms and weights of one rank: what all others must have."""
    return ranks.run_ranks(_train, 1)[0]


CASES = [
    (2, "0,1"),
    (4, "0,0,0,1"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((2, "0,0"), (4, "0,0,0,0"), (4, "0,0,1,1"), (4, "0,1,0,1"))
    ),
    pytest.param(8, "0,0,1,1,1,0,2,2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world_size", "layout"), CASES)
def test_twenty_steps_with_dropout_and_clipping_have_one_hash(run_ranks, alone, world_size, layout):
    steps, weights = alone
    assert len({loss for loss, *_ in steps}) == STEPS  # it does train
    assert any(norm > 0.5 for _, norm, _ in steps)  # and clips
    for outcome in run_ranks(_train, world_size, env={"MLSYS_LOCALITY": layout}):
        assert outcome == (steps, weights)


def _reproducible(rank, world_size):
    runner = _runner("reproducible")
    _steps(rank, world_size, runner, range(2))
    return _hash(runner)


def test_other_numerics_do_depend_on_the_number_of_ranks(run_ranks):
    assert run_ranks(_reproducible, 1)[0] != run_ranks(_reproducible, 2)[0]


def _save(rank, world_size, path):
    runner = _runner()
    _steps(rank, world_size, runner, range(10))
    state = runner.state_dict(full=True)
    if rank == 0:
        torch.save(state, path)


def _continue(rank, world_size, path):
    runner = _runner()
    runner.load_state_dict(torch.load(path, weights_only=True))
    return _steps(rank, world_size, runner, range(10, STEPS)), _hash(runner)


def test_what_two_ranks_saved_one_and_four_continue_bit_for_bit(run_ranks, alone, tmp_path):
    run_ranks(_save, 2, str(tmp_path / "state.pt"))
    steps, weights = alone
    for world_size in (1, 4):
        for outcome in run_ranks(_continue, world_size, str(tmp_path / "state.pt")):
            assert outcome == (steps[10:], weights)


def _plan(strategy=None, world_size=2, model=None, **options):
    options = {"numerics": "world_invariant", "seed": 0} | options
    return (strategy or DataParallel()).plan(Subject(model or mlp()), world_size, PlanOptions(**options))


def test_the_plan_records_the_leaves_and_the_order_of_sums():
    plan = _plan(world_size=4)
    algorithms = dict(plan.algorithms)
    assert (algorithms["leaves"], algorithms["accumulation"], algorithms["gradients"]) == (
        "8",
        "tree",
        "all_reduce_tree",
    )
    assert (plan.accumulate, plan.numerics) == (2, "world_invariant")
    assert _plan(DataParallel(virtual_shards=12), world_size=3).accumulate == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 3}, "onto 1, 2, 4, 8 ranks"),
        ({"world_size": 16}, "onto 1, 2, 4, 8 ranks"),
        ({"strategy": DataParallel(virtual_shards=12), "world_size": 2}, "onto 3, 6, 12 ranks"),
        ({"strategy": DataParallel(compression="int8")}, "Leave compression out"),
        ({"accumulate": 2}, "virtual_shards="),
        ({"compile": True}, "Leave compile out"),
        ({"seed": None}, "Pass seed=0"),
        ({"model": mlp().bfloat16()}, "model.float"),
        ({"strategy": DataParallel(virtual_shards=4), "numerics": "fast"}, "would have no effect"),
    ],
)
def test_plans_that_cannot_honour_it_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        _plan(**arguments)


def _refusals(rank, world_size):
    def wrap(model):
        return strategies.wrap(
            model, optimizer=ADAMW, loss=squared_error, numerics="world_invariant", seed=0, sample=pairs(2)
        )

    with pytest.raises(ConfigError, match="LayerNorm"):
        wrap(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)))
    with pytest.raises(DataError, match="9 microbatches"):
        wrap(mlp()).step([pairs(1)] * 9)


def test_models_and_batches_that_cannot_honour_it_are_refused(run_ranks):
    run_ranks(_refusals, 1)


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        return self.linear(inputs)


def _changing_buffer(rank, world_size):
    runner = strategies.wrap(
        _Counting(), optimizer=ADAMW, loss=squared_error, numerics="world_invariant", seed=0, sample=pairs(2)
    )
    with pytest.raises(ConfigError, match="changes a buffer"):
        runner.step([pairs(1)] * 4)


def test_a_forward_that_changes_a_buffer_is_refused(run_ranks):
    run_ranks(_changing_buffer, 2)
