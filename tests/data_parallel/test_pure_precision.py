"""precision="bf16-pure" and "fp16-pure": parameters in half precision, gradients summed in float32."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from mlsys_engine import optim, strategies
from mlsys_engine.data_parallel.build import FIRST_LOSS_SCALE
from mlsys_engine.errors import ConfigError
from mlsys_engine.models import GPT, GPTConfig
from mlsys_engine.strategies import DataParallel
from tests.data_parallel.models import alone, mlp, pairs, plan_of, squared_error

ADAMW = functools.partial(optim.AdamW, lr=0.01, weight_decay=0.1)
DTYPES = {"bf16-pure": torch.bfloat16, "fp16-pure": torch.float16}


def _bits(model):
    # As text, because numpy has no bf16.
    return {name: tensor.detach().float().tolist() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("precision", DTYPES)
def test_parameters_are_narrow_and_gradients_and_moments_float32(precision):
    model = mlp()
    model[2].weight.requires_grad_(False)
    runner = alone(model, optimizer=ADAMW, precision=precision)
    runner.step([pairs(4), pairs(2)])
    assert runner.predict(pairs(4)).dtype == DTYPES[precision]
    assert {p.dtype for p in model.parameters()} == {DTYPES[precision]}
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for state in runner.state_dict()["optimizer"]["state"].values():
        assert {key: value.dtype for key, value in state.items()} == {
            key: torch.float32 for key in ("step", "exp_avg", "exp_avg_sq", "master")
        }
    assert {bucket.dtype for bucket in runner.plan.buckets} == {"float32"}  # of what is reduced
    runner.close()
    model(torch.zeros(1, 4, dtype=DTYPES[precision])).sum().backward()
    assert model[0].weight.dtype == model[0].weight.grad.dtype == DTYPES[precision]


def test_a_model_that_is_narrow_already_is_taken_as_it_is():
    given = mlp().bfloat16()
    expected = _bits(given)
    runner = alone(
        given, optimizer=functools.partial(optim.AdamW, lr=0.0, weight_decay=0.0), precision="bf16-pure"
    )
    runner.step([pairs(4)])
    assert _bits(given) == expected


def _gradients(model, batch, dtype, scale):
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = squared_error(model(batch[0]), batch)
    return torch.autograd.grad(loss * scale, list(model.parameters()))


@pytest.mark.parametrize("precision", DTYPES)
def test_the_steps_are_those_of_narrow_gradients_added_in_float32(precision):
    dtype = DTYPES[precision]
    by_hand, model = mlp().to(dtype), mlp()
    runner = alone(model, optimizer=ADAMW, precision=precision)
    optimizer = optim.AdamW(by_hand.named_parameters(), lr=0.01, weight_decay=0.1)
    scale = FIRST_LOSS_SCALE if precision == "fp16-pure" else 1.0
    for parameter in by_hand.parameters():
        parameter.grad_dtype = torch.float32
    for step in range(5):
        batches = [pairs(3, seed=10 * step), pairs(5, seed=10 * step + 1)]
        runner.step(batches)
        parts = [_gradients(by_hand, batch, dtype, scale) for batch in batches]
        assert {gradient.dtype for part in parts for gradient in part} <= {dtype, torch.float32}
        for parameter, first, second in zip(by_hand.parameters(), *parts, strict=True):
            parameter.grad = first.float() + second.float()
        optimizer.step_scaled(grad_scale=1 / (16 * scale))
        for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
    assert _bits(model) == _bits(by_hand)


@pytest.mark.parametrize("precision", DTYPES)
def test_updates_too_small_for_the_type_of_a_parameter_add_up(precision):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return x * self.weight

    # Each step takes 1e-4 off 1: below half a unit in the last place of bf16 (4e-3) and of fp16 (5e-4).
    runner = alone(
        One(), optimizer=functools.partial(optim.SGD, lr=1e-4), precision=precision,
        loss=lambda output, _: (output.sum(), 1),
    )  # fmt: skip
    for _ in range(100):
        runner.step([torch.ones(1, 64)])
    weight = runner.model.weight.detach().float()
    # Off by the rounding to the type itself, at most a unit in the last place.
    assert (weight - 0.99).abs().max().item() <= torch.finfo(DTYPES[precision]).eps


def _train(rank, world_size, precision):
    torch.manual_seed(rank)
    model = GPT(GPTConfig(vocab_size=32, context_length=8, num_layers=2, num_heads=2, width=16))
    tokens = torch.randint(0, 32, (4 * world_size, 8), generator=torch.Generator().manual_seed(1))
    sample = {"input_ids": tokens[:1], "labels": tokens[:1]}
    runner = strategies.wrap(
        model, optimizer=ADAMW, precision=precision, strategy=DataParallel(bucket_mib=0.01),
        max_grad_norm=1.0, sample=sample,
    )  # fmt: skip
    own = tokens[rank::world_size]
    losses = []
    for _ in range(30):
        losses.append(runner.step([{"input_ids": part, "labels": part} for part in own.split(2)]).loss.item())
    return losses, _bits(model)


@pytest.mark.parametrize("precision", DTYPES)
def test_ranks_agree_to_the_last_bit_and_learn(run_ranks, precision):
    values = run_ranks(_train, 2, precision)
    assert values[0] == values[1]
    losses = values[0][0]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS.keys() - {"adafactor"}))  # which takes float32 alone
@pytest.mark.parametrize("precision", ["fp16", *DTYPES])
def test_every_optimizer_goes_on_bit_for_bit_from_its_state(name, precision):
    factory = functools.partial(optim.optimizer_class(name), lr=0.01)
    first = alone(mlp(), optimizer=factory, precision=precision, max_grad_norm=0.5)
    for step in range(3):
        first.step([pairs(4, seed=step)])
    second = alone(mlp(seed=5), optimizer=factory, precision=precision, max_grad_norm=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict(full=True)))
    for step in range(3, 6):
        for runner in (first, second):
            runner.step([pairs(4, seed=step)])
    assert _bits(second.model) == _bits(first.model)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_training_that_goes_on_in_float32_has_the_bits_that_were_kept_beside_the_parameters(precision):
    narrow = alone(mlp(), optimizer=ADAMW, precision=precision)
    for step in range(5):
        narrow.step([pairs(4, seed=step)])
    saved = copy.deepcopy(narrow.state_dict(full=True))
    saved["model"]["0.bias"][1] = 7.0  # written by somebody else
    wide = alone(mlp(seed=5), optimizer=ADAMW, precision="bf16")
    wide.load_state_dict(saved)
    masters = {name: values["master"] for name, values in saved["optimizer"]["state"].items()}
    assert any(not torch.equal(masters[name], saved["model"][name].float()) for name in masters)
    masters["0.bias"][1] = 7.0
    assert all(torch.equal(parameter, masters[name]) for name, parameter in wide.model.named_parameters())
    assert not wide.step([pairs(4)]).skipped


def test_an_optimizer_is_made_for_the_type_that_it_will_step_and_a_refusal_leaves_the_model_alone():
    model = mlp()
    expected = _bits(model)
    with pytest.raises(ConfigError, match=r"0\.weight is bfloat16"):
        alone(model, functools.partial(optim.Adafactor, lr=0.01), precision="bf16-pure")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert _bits(model) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: alone(mlp(), precision="bf16-pure"), "torch's SGD.*mls.optim's optimizers"),
        (
            lambda: alone(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), ADAMW, precision="fp16-pure"),
            "BatchNorm1d at '1'.*precision='fp16'",
        ),
        (lambda: plan_of(mlp().half(), precision="bf16-pure"), "is float16"),
        (
            lambda: strategies.plan(mlp(), DataParallel(shard="optimizer"), world=2, precision="bf16-pure"),
            "Sharding steps float32 parameters",
        ),
        (
            lambda: strategies.plan(mlp(), DataParallel(compression="int8"), world=2, precision="fp16-pure"),
            "Use precision='bf16-pure'",
        ),
    ],
)
def test_what_a_pure_precision_cannot_do_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
