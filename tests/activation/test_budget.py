"""A budget is kept, changes no bit, and says clearly what it cannot do."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine import activation, models, strategies
from mlsys_engine.activation import ActivationPlan
from mlsys_engine.activation.budget import parse_budget
from mlsys_engine.activation.measure import Times, scalar
from mlsys_engine.activation.segments import parse
from mlsys_engine.errors import ConfigError
from mlsys_engine.memory import SavedActivationMeter
from tests.activation.models import Nested, Normed, Stack

Case = tuple[nn.Module, dict[str, Any] | Tensor]


class Residual(nn.Module):
    """A residual block with BatchNorm, whose ReLUs work in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norms[0](self.first(x)))
        return self.relu(self.norms[1](self.second(y)) + x)


def resnet() -> Case:
    stages = [nn.Sequential(*(Residual(8) for _ in range(3))) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return model, torch.randn(4, 3, 12, 12)


def gpt() -> Case:
    config = models.GPTConfig(num_layers=6, width=32, num_heads=2, context_length=32, dropout=0.1)
    tokens = torch.randint(0, 256, (2, 32))
    return models.GPT(config), {"input_ids": tokens, "labels": tokens}


def hugging_face(name: str) -> Case:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    tokens = torch.randint(0, 64, (2, 16))
    if name == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **sizes)
        images = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([1, 2])}
        return transformers.ViTForImageClassification(config), images
    if name == "gpt2":
        made = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=64, n_positions=16)
        model = transformers.GPT2LMHeadModel(made)
    elif name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    else:
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **sizes))
    return model.train(), {"input_ids": tokens, "labels": tokens}


CASES: dict[str, Callable[[], Case]] = {
    "stack": lambda: (Stack(depth=6), torch.randn(8, 16)),
    "buffers": lambda: (Normed(), torch.randn(8, 16)),
    "shared inside a block": lambda: (Nested(), torch.randn(8, 16)),
    "resnet": resnet,
    "gpt": gpt,
    **{name: lambda name=name: hugging_face(name) for name in ("gpt2", "llama", "bert", "vit")},
}


def call(model: nn.Module, sample: dict[str, Any] | Tensor) -> Tensor:
    return scalar(model(**sample) if isinstance(sample, dict) else model(sample))


def step(model: nn.Module, sample: dict[str, Any] | Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients, buffers and random state of a step, and the peak of what it saved."""
    model.zero_grad()
    torch.manual_seed(5)
    with SavedActivationMeter(model) as meter:
        call(model, sample).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    state = {"random": torch.get_rng_state(), **dict(model.named_buffers())}
    return copy.deepcopy({**found, **state}), meter.peak_bytes


@pytest.mark.parametrize("name", CASES)
def test_gradients_keep_their_bits_and_the_peak_its_budget(name: str) -> None:
    torch.manual_seed(0)
    model, sample = CASES[name]()
    plain, state = copy.deepcopy(model), torch.get_rng_state()
    plans = [activation.plan(model, sample, budget, repeats=0) for budget in (1.0, 0.85, 0.6)]
    assert plans[0].actions == () and plans[2].actions
    assert torch.equal(state, torch.get_rng_state())
    for key, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), f"planning changed {key}"
    assert all(parameter.grad is None for parameter in model.parameters())
    for plan in plans:
        fresh = copy.deepcopy(plain)
        planned = plan.apply(copy.deepcopy(plain))
        for _ in range(2):
            expected, plain_peak = step(fresh, sample)
            found, peak = step(planned, sample)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(value, found[key]), key
            assert plain_peak == plan.profile.plain_peak_bytes
            assert peak == plan.measured_peak_bytes <= plan.budget_bytes


def test_prediction_is_what_is_measured_and_more_budget_is_never_slower() -> None:
    model, sample = gpt()
    plans = [activation.plan(model, sample, budget, repeats=0) for budget in (0.3, 0.5, 0.7, 0.9)]
    for plan in plans:
        assert plan.predicted_peak_bytes == plan.measured_peak_bytes
    reruns = [len(plan.schedule.steps) for plan in plans]
    assert reruns == sorted(reruns, reverse=True)


def test_a_small_budget_runs_blocks_again_from_a_distance() -> None:
    model, sample = Stack(depth=12), torch.randn(64, 16)
    with pytest.raises(ConfigError, match=r"Give at least ([\d,]+)") as refusal:
        activation.plan(model, sample, 1000)
    least = int(str(refusal.value).rpartition("Give at least ")[2].split(", or")[0].replace(",", ""))
    plan = activation.plan(model, sample, least, repeats=0)
    assert plan.measured_peak_bytes <= least
    reruns = [parse(action) for _, action in plan.actions]
    assert any(rerun.linked for rerun in reruns) and any(rerun.before for rerun in reruns)


def test_without_a_sample_the_first_training_forward_makes_the_plan() -> None:
    torch.manual_seed(0)
    model, sample = gpt()
    plain = copy.deepcopy(model)
    activation.checkpoint(model, policy="budget", budget=0.6)
    with torch.no_grad():
        call(model, sample)
    expected, plain_peak = step(plain, sample)
    first, _ = step(model, sample)
    second, peak = step(model, sample)
    for key, value in expected.items():
        assert torch.equal(value, first[key]) and torch.equal(value, second[key]), key
    assert peak <= 0.6 * plain_peak
    activation.uncheckpoint(model)
    assert step(model, sample)[1] == plain_peak


def test_a_planned_model_is_copied_and_pickled_with_its_plan() -> None:
    torch.manual_seed(0)
    model, sample = Stack(depth=8), torch.randn(8, 16)
    activation.checkpoint(model, policy="budget", budget=0.5, sample=sample)
    expected, peak = step(model, sample)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, peak_again = step(again, sample)
        assert peak_again == peak
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key


def test_a_plan_survives_json_and_prints_a_line_a_block() -> None:
    model, sample = gpt()
    plan = activation.plan(model, sample, "60%", repeats=1)
    assert ActivationPlan.from_json(plan.to_json()) == plan
    lines = str(plan).splitlines()
    assert "of a budget of" in lines[0] and len(lines) == 3 + 6 + 3
    assert dict(plan.actions).keys() == {line.split()[0] for line in lines if "recompute" in line}


def test_the_plan_of_a_model_takes_it_as_its_activation() -> None:
    model, sample = gpt()
    plan = activation.plan(model, sample, 0.5, repeats=0)
    whole = strategies.plan(model, strategies.DataParallel(), sample, activation=plan)
    assert whole.activation == plan.actions
    assert type(whole).from_json(whole.to_json()) == whole


def test_lossy_options_keep_a_budget_that_is_too_small_without_them() -> None:
    model, sample = gpt()
    with pytest.raises(ConfigError) as refused:
        activation.plan(model, sample, "1KiB", repeats=0)
    least = int(str(refused.value).split("Give at least ")[1].split(", or")[0].replace(",", ""))
    plan = activation.plan(model, sample, least - 1024, repeats=0, lossy="int8")
    assert plan.measured_peak_bytes <= plan.budget_bytes
    assert any("int8" in action for _, action in plan.actions)
    _, peak = step(plan.apply(model), sample)
    assert peak <= plan.budget_bytes


def test_offloading_takes_the_place_of_recomputing_where_it_costs_less(monkeypatch: Any) -> None:
    model, sample = gpt()

    def equal_times(block: Any, call: Any, ways: dict[str, Any]) -> dict[str, Times]:
        return {name: Times(forward_s=1.0, backward_s=2.0, backward_peak_bytes=0) for name in ways}

    monkeypatch.setattr("mlsys_engine.activation.profile.time_block", equal_times)
    plan = activation.plan(model, sample, 0.45, repeats=0, offload=True)
    assert any(action.endswith("offload") for _, action in plan.actions)
    assert not any("recompute" in action for _, action in plan.actions)
    assert ActivationPlan.from_json(plan.to_json()) == plan
    expected, _ = step(copy.deepcopy(model), sample)
    found, peak = step(plan.apply(model), sample)
    assert peak <= plan.budget_bytes
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def _train_under_a_budget(rank: int, world_size: int) -> tuple[str, list[list[float]], list[Any]]:
    torch.manual_seed(0)
    model, sample = gpt()
    plan = activation.plan(model, sample, 0.5, repeats=0)
    losses, actions = [], []
    for chosen, first in ((None, sample), (plan, sample), ("50%", sample), (0.5, None)):
        torch.manual_seed(rank)
        runner = strategies.wrap(
            copy.deepcopy(model), optimizer=torch.optim.SGD, activation=chosen, sample=first
        )
        losses.append([runner.step([sample]).loss.item() for _ in range(3)])
        actions.append(runner.plan.activation if first is not None else runner.built().plan.activation)
    return plan.to_json(), losses, actions


def test_two_ranks_get_one_plan_and_the_losses_of_the_plain_model(run_ranks: Any) -> None:
    (plan, losses, actions), (other, _, others) = run_ranks(_train_under_a_budget, 2)
    assert plan == other and actions == others
    assert not actions[0] and all(actions[1:])
    assert all(found == losses[0] for found in losses)


def test_a_budget_in_a_plan_is_measured_with_the_precision_and_the_loss_of_training() -> None:
    model, sample = Stack(width=64, depth=8), torch.randn(64, 64)
    make = functools.partial(strategies.plan, model, strategies.DataParallel(), sample, activation=0.5)
    seen: list[torch.dtype] = []

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        seen.append((output @ output.T).dtype)
        return output.square().mean()

    assert make(precision="bf16", loss=loss).activation
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": 0.5}, "without a sample.*train a step"),
        ({"activation": 0.5, "precision": "bf16-pure", "sample": torch.ones(2, 16)}, "would be too large"),
        ({"activation": 1.5, "sample": torch.ones(2, 16)}, "a part of what the plain model keeps"),
        ({"activation": "ful"}, "Did you mean.*full"),
    ],
)
def test_a_plan_refuses_a_budget_that_it_cannot_measure(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategies.plan(Stack(), strategies.DataParallel(), **options)


@pytest.mark.parametrize("budget", [0, 1.5, -1, True, "0%", "101%", "6 gigabytes", "GiB", None, float("nan")])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    with pytest.raises(ConfigError, match="a part of what the plain model keeps"):
        parse_budget(budget)


@pytest.mark.parametrize(
    ("budget", "num_bytes"),
    [
        (0.5, 500),
        ("50%", 500),
        ("0.5", 500),
        (1.0, 1000),
        (1, 1000),
        ("1", 1000),
        (2048, 2048),
        ("2KiB", 2048),
        ("1.5 MiB", 3 * 2**19),
    ],
)
def test_budgets_are_parts_or_sizes(budget: Any, num_bytes: int) -> None:
    assert parse_budget(budget)(1000) == num_bytes


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh())])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[0](x))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: activation.plan(CalledTwice(), torch.randn(2, 8), 0.5), r"called 2 times.*policy=\"full\""),
        (
            lambda: activation.plan(activation.checkpoint(Stack()), torch.ones(2, 16), 0.5),
            "checkpointed already",
        ),
        (lambda: activation.checkpoint(Stack(), policy="budget"), "without a budget"),
        (lambda: activation.checkpoint(Stack(), policy="full", budget=0.5), "would have no effect"),
        (lambda: activation.checkpoint(Stack(), offload=True), "keeps nothing that could be moved"),
        (lambda: activation.checkpoint(Stack(), lossy="int4"), "Lossy forms: bf16, fp8, int8"),
        (
            lambda: activation.checkpoint(Stack(), policy="selective", offload=True, lossy="fp8"),
            "either packs what it keeps or moves it",
        ),
        (lambda: activation.resolve(Stack(), "budget"), "Give the budget itself"),
    ],
)
def test_what_cannot_be_planned_is_refused(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act()
