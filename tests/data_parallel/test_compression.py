"""Compressed gradients end to end: convergence near the uncompressed run, bytes, exact resume, refusals."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import pytest
import torch

from mlsys_engine import comm, optim, strategies
from mlsys_engine.errors import ConfigError
from mlsys_engine.strategies import DataParallel, PlanOptions
from mlsys_engine.strategies.base import Subject
from tests.data_parallel.models import mlp, pairs, squared_error

SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAMW = functools.partial(optim.AdamW, lr=0.02)
TWO_HOSTS = {"MLSYS_LOCALITY": "0,1"}
SETTINGS = {
    "bf16": {"compression": "bf16"},
    "int8": {"compression": "int8"},
    "powersgd": {"compression": "powersgd", "powersgd_rank": 1, "powersgd_start_step": 2},
}


def _runner(optimizer=SGD, width=32, bucket_mib=25.0, **settings):
    strategy = DataParallel(bucket_mib=bucket_mib, **settings)
    model = mlp(width=width)
    return strategies.wrap(
        model, optimizer=optimizer, loss=squared_error, strategy=strategy, sample=pairs(8), seed=3
    )


def _weights(runner):
    return {name: tensor.detach().numpy().copy() for name, tensor in runner.model.state_dict().items()}


def _batch(rank, step):
    inputs, _ = pairs(16, seed=100 * step + rank)
    return inputs, inputs[:, :2].sin()


def _losses(rank, steps, runner):
    return [runner.step([_batch(rank, step % 4)]).loss.item() for step in range(steps)]


def _train(rank, world_size):
    results = {}
    for name, settings in {None: {}, **SETTINGS}.items():
        runner = _runner(ADAMW, **settings)
        losses = _losses(rank, 60, runner)
        results[name] = np.mean(losses[:4]), np.mean(losses[-4:]), _weights(runner)
        runner.close()
    return results


def test_training_under_compression_ends_near_the_uncompressed_one(run_ranks):
    ours, theirs = run_ranks(_train, 2, env=TWO_HOSTS)
    # Over the four batches the loss falls to less than a tenth; the runs end within a fiftieth of that fall.
    first, last, plain = ours[None]
    assert last < 0.1 * first
    for name in SETTINGS:
        _, compressed, weights = ours[name]
        assert compressed == pytest.approx(last, abs=0.02 * (first - last))
        assert all(np.array_equal(weights[key], theirs[name][2][key]) for key in weights)
        assert not all(np.array_equal(weights[key], plain[key]) for key in weights)


def _small_gradients(rank, world_size, with_feedback):
    """One parameter's gradient is far below half a step of int8 beside the other's, on both ranks alike."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    runner = strategies.wrap(
        model, optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        loss=lambda output, batch: (output.sum(), 1),
        strategy=DataParallel(compression="int8"), sample=torch.ones(1, 2), seed=3,
    )  # fmt: skip
    start = model.weight.detach().clone()
    for _ in range(200):
        if not with_feedback:
            for residual in runner.state_dict()["reduction"]["residuals"]:
                residual.zero_()
        runner.step([torch.tensor([[1.0, 0.002]])])
    moved = start - model.weight.detach()
    return (moved / (200 * 0.5 * torch.tensor([[1.0, 0.002]]))).tolist()[0]


def test_without_error_feedback_small_gradients_are_lost_for_ever(run_ranks):
    (large, small), _ = run_ranks(_small_gradients, 2, True, env=TWO_HOSTS)
    assert large == pytest.approx(1.0, abs=1e-3)
    # 200 steps of 0.002 are some 51 quanta of 1/127, and what is still owed at most two halves of one.
    assert small == pytest.approx(1.0, abs=1 / 51 * 1.5)
    (_, small), _ = run_ranks(_small_gradients, 2, False, env=TWO_HOSTS)
    assert small == 0.0


def _bytes(rank, world_size):
    sent = {}
    for name, settings in {None: {}, **SETTINGS}.items():
        runner = _runner(width=512, **settings)
        runner.step([_batch(rank, 0)])
        runner.step([_batch(rank, 1)])
        before = comm.counters().tcp_bytes_sent
        runner.step([_batch(rank, 2)])
        sent[name] = comm.counters().tcp_bytes_sent - before
        runner.close()
    return sent


def test_bytes_of_a_step_shrink(run_ranks):
    for sent in run_ranks(_bytes, 2, env=TWO_HOSTS):
        # 270,000 gradients are 1 MB; the statistics of a step are some hundred bytes.
        assert 1.95 < sent[None] / sent["bf16"] < 2.05
        assert 3.8 < sent[None] / sent["int8"] < 4.0
        assert sent[None] / sent["powersgd"] > 20


def _resumed(rank, world_size, settings):
    runner = _runner(ADAMW, **settings)
    _losses(rank, 5, runner)
    state = runner.state_dict(full=True)
    straight = _losses(rank, 5, runner)
    runner.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = _runner(ADAMW, **settings)
        again.load_state_dict(state)
    resumed = _losses(rank, 5, again)
    again.close()
    without = _runner(ADAMW, **settings)
    with pytest.warns(UserWarning, match="starts anew from zero"):
        without.load_state_dict({key: state[key] for key in ("model", "optimizer")})
    return straight, resumed, _losses(rank, 5, without)


@pytest.mark.parametrize(("name", "layout"), [("bf16", "0,1"), ("int8", "0,0,1"), ("powersgd", "0,1")])
def test_resuming_with_the_residuals_is_exact_and_without_them_is_not(run_ranks, name, layout):
    size = len(layout.split(","))
    for straight, resumed, without in run_ranks(
        _resumed, size, SETTINGS[name], env={"MLSYS_LOCALITY": layout}
    ):
        assert resumed == straight
        assert without != straight


def _other_layout(rank, world_size):
    runner = _runner(compression="int8", bucket_mib=1e-4)
    _losses(rank, 3, runner)
    state = runner.state_dict(full=True)
    runner.close()
    other = _runner(compression="int8")
    with pytest.warns(UserWarning, match="starts anew from zero"):
        other.load_state_dict(state)
    assert not any(residual.any() for residual in other.state_dict()["reduction"]["residuals"])


def test_residuals_of_other_buckets_are_not_taken_for_these(run_ranks):
    run_ranks(_other_layout, 2, env=TWO_HOSTS)


def _one_host(rank, world_size):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = _runner(compression="int8")
    said = sum("has no effect" in str(warning.message) for warning in caught)
    losses = _losses(rank, 3, runner)
    runner.close()
    return said, losses, _losses(rank, 3, _runner())


def test_on_one_host_compression_changes_nothing_and_says_so_once(run_ranks):
    outcomes = run_ranks(_one_host, 2)
    assert [said for said, *_ in outcomes] == [1, 0]
    for _, compressed, plain in outcomes:
        assert compressed == plain


def _not_finite(rank, world_size, name):
    runner = _runner(ADAMW, **SETTINGS[name])
    _losses(rank, 3, runner)
    inputs, targets = _batch(rank, 3)
    if rank == 1:
        inputs = inputs.clone().fill_(float("inf"))
    before = _weights(runner)
    result = runner.step([(inputs, targets)])
    after = _weights(runner)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    return result.skipped.item(), _losses(rank, 2, runner)


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_ranks_agree_to_skip_a_step_whose_gradient_is_not_finite(run_ranks, name):
    for skipped, losses in run_ranks(_not_finite, 2, name, env=TWO_HOSTS):
        assert skipped
        assert np.isfinite(losses).all()


def test_the_plan_names_the_compression_and_its_settings():
    def plan(**settings):
        return DataParallel(**settings).plan(Subject(mlp()), 2, PlanOptions())

    plain, int8 = plan(), plan(compression="int8")
    powersgd = plan(compression="powersgd", powersgd_rank=3)
    assert len({plain.hash, int8.hash, powersgd.hash}) == 3
    assert int8.compression == "int8" and "compression int8" in str(int8)
    assert type(int8).from_json(int8.to_json()) == int8
    settings = dict(powersgd.algorithms)
    assert (settings["powersgd_rank"], settings["powersgd_start_step"]) == ("3", "100")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"powersgd_rank": 2}, "would have no effect"),
        ({"compression": "int8", "powersgd_start_step": 9}, "would have no effect"),
        ({"compression": "powersgd", "powersgd_rank": 0}, "at least 1"),
        ({"compression": "powersgd", "powersgd_start_step": 1}, "at least 2"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_ranks_start(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataParallel(**settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_of_another_type_than_float32_are_refused_by_the_plan(name):
    with pytest.raises(ConfigError, match="Only float32 gradients"):
        DataParallel(**SETTINGS[name]).plan(Subject(mlp().double()), 2, PlanOptions())
