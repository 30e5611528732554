"""One rank, no process group: what a step does to a model, against plain torch."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from mlsys_engine.data_parallel.build import build_runner
from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.optim import ScheduleFreeAdamW
from mlsys_engine.plan import Runner
from tests.data_parallel.models import SGD, alone, mlp, pairs, plan_of, squared_error

# Sums of a few dozen fp32 products in another order, through a square: relative 1e-6 is some ten roundings.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def _torch_step(model, optimizer, batches, max_norm=None):
    """The mean over everything counted, as one process would take it."""
    optimizer.zero_grad()
    parts = [squared_error(model(batch[0]), batch) for batch in batches]
    mean = sum(part for part, _ in parts) / sum(count for _, count in parts)
    mean.backward()
    norm = clip_grad_norm_(model.parameters(), max_norm if max_norm is not None else float("inf"))
    optimizer.step()
    return mean.item(), norm.item()


def _assert_same_weights(model, other):
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), **CLOSE)


def test_it_is_a_runner_of_the_only_share():
    runner = alone(mlp())
    assert isinstance(runner, Runner)
    assert (runner.data_rank, runner.num_data_shards) == (0, 1)


@pytest.mark.parametrize("max_norm", [None, 1e-2, 1e3])
def test_steps_are_those_of_torch_with_clip_grad_norm(max_norm):
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SGD(twin.parameters())
    runner = alone(model, max_grad_norm=max_norm)
    for step in range(5):
        result = runner.step([pairs(6, seed=step)])
        loss, norm = _torch_step(twin, optimizer, [pairs(6, seed=step)], max_norm)
        assert result.loss.item() == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-5)
        assert result.num_tokens.item() == 12 and not result.skipped
    _assert_same_weights(model, twin)


def test_microbatches_of_unequal_size_are_one_batch():
    model = mlp()
    twin = copy.deepcopy(model)
    whole = pairs(9)
    parts = [tuple(tensor[start:end] for tensor in whole) for start, end in ((0, 5), (5, 6), (6, 9))]
    result = alone(model, max_grad_norm=0.1).step(parts)
    loss, _ = _torch_step(twin, SGD(twin.parameters()), [whole], 0.1)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    _assert_same_weights(model, twin)


def test_the_results_of_a_step_are_tensors_without_dimensions():
    result = alone(mlp()).step([pairs(2)])
    kinds = {name: getattr(result, name).dtype for name in ("loss", "grad_norm", "skipped", "num_tokens")}
    assert kinds == {
        "loss": torch.float64,
        "grad_norm": torch.float64,
        "skipped": torch.bool,
        "num_tokens": torch.int64,
    }
    assert set(result.timings) == {"forward", "backward", "wait", "optimizer"}
    assert all(seconds >= 0 for seconds in result.timings.values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_the_next_step_is_normal(poison):
    model = mlp()
    twin = copy.deepcopy(model)
    runner = alone(model, optimizer=functools.partial(torch.optim.AdamW, lr=0.1))
    inputs, targets = pairs(4)
    bad = runner.step([(inputs * poison, targets)])
    assert bad.skipped and not bad.grad_norm.isfinite()
    _assert_same_weights(model, twin)
    assert not runner.optimizer.state
    assert not runner.step([pairs(4)]).skipped


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 4), torch.zeros(0, 2))]])
def test_a_step_that_counts_nothing_is_skipped(batches):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    result = alone(model).step(batches)
    assert result.skipped and result.num_tokens == 0 and result.loss.isnan()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_unused_parameter_is_left_alone_as_torch_leaves_it():
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})
    model.forward = model["used"].__call__
    before = model["unused"].weight.detach().clone()
    runner = alone(model, optimizer=functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    runner.step([pairs(3)])
    assert model["unused"].weight.grad is None
    assert torch.equal(model["unused"].weight, before)
    assert model["unused"].weight not in runner.optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_callbacks_may_read_and_zero_gradients_between_steps(set_to_none):
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer = SGD(twin.parameters())
    runner = alone(model)
    for step in range(3):
        runner.step([pairs(5, seed=step)])
        _torch_step(twin, optimizer, [pairs(5, seed=step)])
        torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad, **CLOSE)
        runner.optimizer.zero_grad(set_to_none=set_to_none)
    _assert_same_weights(model, twin)


def test_a_batch_may_be_a_mapping_with_labels_for_the_loss_function():
    runner = alone(
        nn.Linear(4, 2), loss=lambda output, batch: (output - batch["labels"]).square().mean(dim=1).mean()
    )
    inputs, targets = pairs(3)
    result = runner.step([{"input": inputs, "labels": targets}])
    assert result.num_tokens == 3


def test_without_a_loss_function_a_tuple_is_all_arguments():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, inputs, targets):
            return {"loss": (self.layer(inputs) - targets).square().mean()}

    assert alone(WithLoss(), loss=None).step([pairs(3)]).num_tokens == 3


@pytest.mark.parametrize("batches", [torch.zeros(2, 4), {"input": torch.zeros(2, 4)}, None])
def test_one_batch_instead_of_a_list_is_refused(batches):
    with pytest.raises(DataError, match=r"Pass \[batch\]"):
        alone(mlp()).step(batches)


def test_modes_of_modules_are_kept_by_steps_and_put_back_after_evaluation():
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    model[2].eval()
    runner = alone(model)
    seen = []
    model[1].register_forward_hook(lambda module, args, output: seen.append(module.training))
    runner.step([pairs(4)])
    runner.evaluate(pairs(4))
    runner.predict(pairs(4))
    assert seen == [True, False, False]
    assert [module.training for module in model] == [True, True, False]
    assert model[2].num_batches_tracked == 0


def test_evaluation_gives_sum_and_count_and_changes_nothing():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    runner = alone(model)
    result = runner.evaluate(pairs(3))
    expected, count = squared_error(model(pairs(3)[0]), pairs(3))
    assert (result.loss_sum.item(), result.count.item()) == (expected.item(), count)
    assert (result.loss_sum.dtype, result.count.dtype) == (torch.float64, torch.int64)
    nothing = runner.evaluate(None)
    assert (nothing.loss_sum.item(), nothing.count.item()) == (0.0, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is None


def test_an_optimizer_that_averages_the_weights_shows_the_average_in_evaluation_and_at_the_end():
    model = mlp()
    runner = alone(model, optimizer=functools.partial(ScheduleFreeAdamW, lr=0.05))
    twin = mlp()
    optimizer = ScheduleFreeAdamW(twin.parameters(), lr=0.05)
    for seed in range(3):
        runner.step([pairs(4, seed=seed)])
        _torch_step(twin, optimizer, [pairs(4, seed=seed)])
        runner.evaluate(pairs(3))  # training goes on as if it had not been
    _assert_same_weights(model, twin)
    optimizer.eval()
    torch.testing.assert_close(runner.predict(pairs(3)), twin(pairs(3)[0]).detach(), **CLOSE)
    runner.close()
    _assert_same_weights(model, twin)


def test_prediction_is_the_output_without_a_graph():
    runner = alone(mlp())
    output = runner.predict(pairs(3))
    assert output.shape == (3, 2) and not output.requires_grad


def test_an_error_in_a_step_leaves_the_runner_usable():
    model = mlp()
    runner = alone(model)
    with pytest.raises(RuntimeError):
        runner.step([pairs(2), (torch.zeros(2, 99), torch.zeros(2, 2))])
    twin = copy.deepcopy(mlp())
    runner.step([pairs(2)])
    _torch_step(twin, SGD(twin.parameters()), [pairs(2)])
    _assert_same_weights(model, twin)


def test_after_close_the_model_is_ordinary_again_and_can_be_laid_out_anew():
    model = mlp()
    runner = alone(model)
    runner.step([pairs(2)])
    weight = model[0].weight.detach().clone()
    with pytest.raises(ConfigError, match="already laid out"):
        alone(model)
    runner.close()
    assert torch.equal(model[0].weight, weight)
    model.double().float()
    alone(model).step([pairs(2)])


def test_reproducible_computes_with_deterministic_algorithms_and_fast_does_not():
    seen = []

    def loss(output, batch):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return squared_error(output, batch)

    for numerics in ("reproducible", "fast"):
        runner = alone(mlp(), loss=loss, numerics=numerics)
        runner.step([pairs(2)])
        runner.evaluate(pairs(2))
    assert seen == [True, True, False, False]


def test_frozen_parameters_are_neither_laid_out_nor_stepped():
    model = mlp()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    given = []

    def factory(named):
        given.extend(name for name, _ in named)
        return SGD([parameter for _, parameter in named])

    alone(model, optimizer=factory).step([pairs(3)])
    assert given == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (torch.optim.SGD(mlp().parameters()), "already exists"),
        ("adamw", "factory"),
        (lambda named: None, "returned a NoneType"),
        (lambda named: torch.optim.SGD([]), "without parameters"),
        (lambda named: torch.optim.SGD([{"params": []}]), "without parameters"),
        (lambda named: torch.optim.SGD(mlp().parameters()), "6 parameters that are not this model's"),
    ],
)
def test_what_is_no_optimizer_factory_is_refused_and_the_model_left_as_it_was(factory, message):
    model = mlp()
    with pytest.raises(ConfigError, match=message):
        alone(model, optimizer=factory)
    model.double()


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        alone(mlp().requires_grad_(False))


def test_a_plan_of_another_model_is_refused_by_the_first_parameter_that_differs():
    plan = plan_of(mlp(width=9))
    with pytest.raises(ConfigError, match=r"plan has 0\.bias as torch\.float32 \(9,\)"):
        build_runner(
            plan,
            mlp(),
            optimizer=SGD,
            loss=None,
            max_grad_norm=None,
            device=torch.device("cpu"),
            group=None,
        )


def test_a_meta_model_and_a_bad_norm_are_refused():
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    with pytest.raises(ConfigError, match="meta device"):
        alone(model)
    for norm in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="max_grad_norm"):
            alone(mlp(), max_grad_norm=norm)
