"""precision="bf16" and "fp16": autocast over float32 parameters, and the loss scale that fp16 needs."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from mlsys_engine import optim, strategies
from mlsys_engine.activation import checkpoint
from mlsys_engine.data_parallel.build import FIRST_LOSS_SCALE
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import loss_sum_and_count
from mlsys_engine.strategies import DataParallel
from tests.data_parallel.models import alone, mlp, pairs, plan_of, squared_error
from tests.data_parallel.sharding import Uneven, weights_of

ADAMW = functools.partial(optim.AdamW, lr=0.01, weight_decay=0.1)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Recording(nn.Module):
    """Notes the types in which its products come out."""

    def __init__(self):
        super().__init__()
        self.layers, self.seen = mlp(), []

    def forward(self, x):
        output = self.layers(x)
        self.seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
        return output


@pytest.mark.parametrize("precision", DTYPES)
def test_products_are_in_half_precision_and_parameters_gradients_and_moments_in_float32(precision):
    model = Recording()
    runner = alone(model, optimizer=ADAMW, precision=precision)
    runner.step([pairs(4)])
    runner.evaluate(pairs(4))
    assert runner.predict(pairs(4)).dtype == DTYPES[precision]
    assert model.seen == [(DTYPES[precision], True)] * 3
    assert not torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in runner.optimizer.state.values()} == {torch.float32}
    assert runner.plan.precision == precision and precision in str(runner.plan)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_steps_are_those_of_autocast_by_hand(precision):
    by_hand, model = mlp(), mlp()
    runner = alone(model, optimizer=ADAMW, precision=precision, max_grad_norm=0.5)
    optimizer = optim.AdamW(by_hand.named_parameters(), lr=0.01, weight_decay=0.1)
    scale = FIRST_LOSS_SCALE if precision == "fp16" else 1.0
    for step in range(6):
        batches = [pairs(3, seed=10 * step), pairs(5, seed=10 * step + 1)]
        result = runner.step(batches)
        optimizer.zero_grad()
        losses = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            with torch.autocast("cpu", dtype=DTYPES[precision]):
                loss, _ = squared_error(by_hand(batch[0]), batch)
            (loss * scale).backward()
            losses += loss.detach()
        norm = optimizer.sum_of_squares().sqrt() / (16 * scale)
        factor = torch.ones_like(norm) / (16 * scale) * torch.clamp(0.5 / (norm + 1e-6), max=1.0)
        optimizer.step_scaled(grad_scale=factor)
        assert result.loss.item() == losses.item() / 16
        assert result.grad_norm.item() == norm.item()
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_vanishes_in_fp16_without_a_loss_scale_is_there_with_it():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x).float() * 1e-9

    norms = []
    for scaler in (optim.LossScaler(init_scale=1.0), optim.LossScaler(init_scale=2.0**16)):
        runner = alone(Faint(), precision="fp16", loss_scaler=scaler)
        norms.append(runner.step([pairs(4)]).grad_norm.item())
    assert norms[0] == 0.0
    assert norms[1] > 0.0


def _train(rank, world_size, settings, steps=12, precision="fp16"):
    """Two microbatches a rank, of which rank 0 lacks one; one step with an inf on the last rank alone."""
    model = Uneven()
    scaler = optim.LossScaler(init_scale=2.0**10, growth_interval=3) if precision == "fp16" else None
    runner = strategies.wrap(
        model,
        optimizer=ADAMW,
        loss=squared_error,
        strategy=DataParallel(bucket_mib=0.01, **settings),
        precision=precision,
        loss_scaler=scaler,
        max_grad_norm=0.5,
        sample=pairs(1),
    )
    results = []
    for step in range(steps):
        batches = [pairs(rank + 1, seed=10 * step + part) for part in range(1 if rank == 0 else 2)]
        if step == 7 and rank == world_size - 1:
            batches[0][0].fill_(math.inf)
        before = weights_of(model)
        result = runner.step(batches)
        kept = all(np.array_equal(value, before[name]) for name, value in weights_of(model).items())
        scale = result.measured["loss_scale"].item() if scaler else None
        results.append(
            (str(result.loss.item()), str(result.grad_norm.item()), bool(result.skipped), kept, scale)
        )
    return results, weights_of(model)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_all_ranks_skip_a_bad_step_together_and_lower_the_scale_alike(run_ranks, world_size):
    values = run_ranks(_train, world_size, {})
    for results, weights in values:
        assert results == values[0][0]
        assert all(np.array_equal(weights[name], values[0][1][name]) for name in weights)
    *_, skipped, kept, scales = zip(*values[0][0], strict=True)
    assert list(skipped) == list(kept) == [step == 7 for step in range(12)]
    grown = [2.0**10] * 3 + [2.0**11] * 3 + [2.0**12] * 2  # grown after every third good step
    assert list(scales) == grown + [2.0**11] * 3 + [2.0**12]


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_a_sharded_optimizer_gives_the_bits_of_the_whole_one(run_ranks, precision):
    whole = run_ranks(_train, 2, {}, 12, precision)
    parts = run_ranks(_train, 2, {"shard": "optimizer"}, 12, precision)
    for (results, weights), (others, expected) in zip(parts, whole, strict=True):
        assert results == others
        assert all(np.array_equal(weights[name], expected[name]) for name in weights)


def test_the_scale_is_part_of_the_state_and_a_state_without_it_starts_anew():
    runner, other = (alone(mlp(), optimizer=ADAMW, precision="fp16") for _ in range(2))
    runner.step([(torch.full((2, 4), math.inf), torch.zeros(2, 2))])
    state = runner.state_dict(full=True)
    assert state["loss_scaler"]["scale"] == FIRST_LOSS_SCALE / 2
    other.load_state_dict(state)
    assert other.step([pairs(2)]).measured["loss_scale"].item() == FIRST_LOSS_SCALE / 2
    fresh = alone(mlp(), optimizer=ADAMW, precision="fp16")
    fresh.load_state_dict({key: value for key, value in state.items() if key != "loss_scaler"})
    assert fresh.step([pairs(2)]).measured["loss_scale"].item() == FIRST_LOSS_SCALE
    plain = alone(mlp(), optimizer=ADAMW)
    plain.load_state_dict(state)  # fp32 has no use for it
    assert "loss_scaler" not in plain.state_dict()


def test_a_step_that_counts_nothing_is_skipped_and_leaves_the_scale_alone():
    runner = alone(mlp(), optimizer=ADAMW, precision="fp16")
    assert bool(runner.step([]).skipped)
    assert runner.state_dict()["loss_scaler"]["scale"] == FIRST_LOSS_SCALE


@pytest.mark.parametrize("precision", DTYPES)
def test_recomputed_blocks_give_the_bits_of_kept_activations(precision):
    plain, recomputed = mlp(), checkpoint(mlp(), policy="full")
    for step in range(3):
        results = []
        for model in (plain, recomputed):
            runner = alone(model, optimizer=ADAMW, precision=precision)
            results.append(runner.step([pairs(4, seed=step)]).grad_norm.item())
            runner.close()
        assert results[0] == results[1]
    for mine, theirs in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def _invariant(rank, world_size, precision):
    model = mlp(width=32)
    runner = strategies.wrap(
        model, optimizer=ADAMW, loss=squared_error, precision=precision, numerics="world_invariant", seed=0,
        max_grad_norm=0.5, sample=pairs(1),
    )  # fmt: skip
    each = 8 // world_size
    losses = []
    for step in range(5):
        leaves = range(rank * each, (rank + 1) * each)
        losses.append(runner.step([pairs(2, seed=10 * step + leaf) for leaf in leaves]).loss.item())
    return losses, {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "precision",
    [
        "bf16",
        pytest.param("fp16", marks=pytest.mark.slow),
        pytest.param("bf16-pure", marks=pytest.mark.slow),
    ],
)
def test_world_invariant_numerics_hold_under_autocast(run_ranks, precision):
    losses, weights = run_ranks(_invariant, 1, precision)[0]
    for values in run_ranks(_invariant, 2, precision):
        assert values[0] == losses
        assert all(np.array_equal(values[1][name], weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_a_mean_in_half_precision_is_multiplied_by_its_count_in_float32(dtype):
    # 257 has no bf16, and 4 * 20000 is beyond fp16.
    for mean, count in ((1.0, 257), (4.0, 20000)):
        labels = torch.zeros(1, count + 1, dtype=torch.int64)
        output = {"loss": torch.tensor(mean, dtype=dtype, requires_grad=True)}
        total, counted = loss_sum_and_count(output, {"labels": labels}, None)
        assert (total.item(), counted.item(), total.dtype) == (mean * count, count, torch.float32)
    total, _ = loss_sum_and_count(None, None, lambda *_: (torch.ones((), dtype=dtype), 3))
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: plan_of(mlp().bfloat16(), precision="bf16"),
            r"parameter 0.weight is bfloat16.*model\.float",
        ),
        (lambda: plan_of(mlp().double(), precision="fp16"), "is float64"),
        (lambda: plan_of(mlp(), precision="fp8"), "precision='fp8'"),
        (
            lambda: strategies.plan(mlp(), DataParallel(compression="int8"), world=2, precision="fp16"),
            "units of the loss scale",
        ),
        (
            lambda: alone(mlp(), precision="bf16", loss_scaler=optim.LossScaler()),
            "it would have no effect",
        ),
    ],
)
def test_precisions_that_cannot_work_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
