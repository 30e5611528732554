"""A block that does not do the same in both runs is caught, in the first step by its values."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine import activation
from mlsys_engine.activation import recompute
from mlsys_engine.activation.checksum import checksum
from mlsys_engine.errors import ConfigError
from mlsys_engine.memory import SavedActivationMeter
from tests.activation.models import Nested, Normed, Stack

WIDTH = 8
Run = Callable[[Tensor], Tensor]
LINKED = {"blocks.0": "recompute", "blocks.1": "recompute linked after D blocks.0",
          "blocks.2": "recompute linked after D blocks.0 D blocks.1"}  # fmt: skip
POLICIES = {
    "full": {f"blocks.{i}": "recompute" for i in range(3)},
    "linked": LINKED,
    "kept inputs": LINKED | {"blocks.2": "recompute linked after D blocks.0 C blocks.1"},
    "selective": {f"blocks.{i}": "selective" for i in range(3)},
}
RERUN = [name for name in POLICIES if name != "selective"]


class Block(nn.Module):
    """Linear, what `middle` does, Linear, and what `end` does."""

    def __init__(self, middle: Run = torch.tanh, end: Run = lambda x: x) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.middle, self.end = middle, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.down(self.middle(self.up(x))) + x)


class Three(nn.Module):
    def __init__(self, **first: Run) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(**first), Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def model_of(policy: str, **first: Run) -> nn.Module:
    torch.manual_seed(0)
    return activation.apply_actions(Three(**first), POLICIES[policy])


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def by_counter() -> Run:
    calls = itertools.count(1)
    return lambda x: (x * next(calls)).exp()


def by_clock() -> Run:
    return lambda x: x / torch.full_like(x, float(time.perf_counter_ns() % 2**20 + 1))


def by_own_generator() -> Run:
    generator = torch.Generator().manual_seed(0)
    return lambda x: x * (torch.rand(x.shape, generator=generator) > 0.5)


def by_permutation() -> Run:
    generator = torch.Generator().manual_seed(0)
    return lambda x: x[torch.randperm(len(x), generator=generator)]


@pytest.mark.parametrize("policy", RERUN)
@pytest.mark.parametrize(
    ("make", "operation"),
    [
        (by_counter, "saved by exp"),
        (by_clock, "saved by div"),
        (by_own_generator, "saved by mul"),
        (by_permutation, "saved by index"),
    ],
)
def test_a_block_with_other_values_is_caught_in_the_first_step_with_its_operation(
    policy: str, make: Callable[[], Run], operation: str
) -> None:
    model = model_of(policy, middle=make())
    with pytest.raises(
        activation.RecomputeMismatchError, match=rf"'blocks\.0' saved .*{operation}.* with other values"
    ):
        model(torch.randn(64, WIDTH)).sum().backward()


@pytest.mark.parametrize("policy", ["linked", "kept inputs"])
def test_a_block_that_returns_other_values_is_named_and_not_the_block_that_takes_them(policy: str) -> None:
    calls = itertools.count()
    model = model_of(policy, end=lambda x: x + next(calls))
    with pytest.raises(
        activation.RecomputeMismatchError, match=r"'blocks\.0' returned other values .*given by add"
    ):
        model(torch.randn(4, WIDTH)).sum().backward()


def test_an_operation_that_saves_nothing_is_named_by_the_one_that_saves_its_result() -> None:
    calls = itertools.count()
    model = model_of("full", middle=lambda x: (x + next(calls)).unsqueeze(0))
    with pytest.raises(activation.RecomputeMismatchError, match=r"\(given by add, saved by addmm\)"):
        model(torch.randn(4, WIDTH)).sum().backward()


def test_a_block_in_a_block_is_named_before_the_one_around_it() -> None:
    model = Nested(WIDTH)
    calls = itertools.count()
    model.groups[0].inner[0].norm.forward = lambda x: x * next(calls)
    activation.apply_actions(model, {"groups.0": "recompute", "groups.0.inner.0": "recompute"})
    with pytest.raises(activation.RecomputeMismatchError, match=r"'groups\.0(\.inner\.0)?' saved tensor"):
        model(torch.randn(4, WIDTH)).sum().backward()


@pytest.mark.parametrize("change", ["shape", "type", "more", "fewer"])
def test_other_shapes_types_and_numbers_are_told_with_the_operation(change: str) -> None:
    calls = itertools.count()

    def middle(x: Tensor) -> Tensor:
        if next(calls) == 0:
            return x.exp().sin() if change == "fewer" else x.exp()
        if change == "shape":
            return torch.cat([x, x]).exp()[: len(x)]
        if change == "type":
            return x.double().exp().float()
        return x.exp().sin().cos() if change == "more" else x.exp()

    model = activation.apply_actions(
        nn.Sequential(Block(lambda x: x, middle)), {"0": "recompute"}
    )  # the last operation
    expected = {
        "shape": r"\(given by exp, saved by exp\) as torch.float32\(4, 8\).* but as torch.float32\(8, 8\)",
        "type": r"exp\) as torch.float32.* but as torch.float64",
        "more": "more tensors .* of the forward; the first of them is given by exp",
        "fewer": "the first that is missing is .*saved by sin",
    }
    with pytest.raises(activation.RecomputeMismatchError, match=expected[change]):
        model(torch.randn(4, WIDTH)).sum().backward()


@pytest.fixture
def checksums(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The tensors whose checksums were taken."""
    taken: list[Tensor] = []

    def counted(tensor: Tensor) -> Tensor | None:
        taken.append(tensor)
        return checksum(tensor)

    monkeypatch.setattr(recompute, "checksum", counted)
    recompute._hooks.cache_clear()
    yield taken
    recompute._hooks.cache_clear()


def test_the_first_step_pays_and_no_other(checksums: list[Tensor]) -> None:
    model, x = model_of("kept inputs"), torch.randn(4, WIDTH)
    with torch.no_grad():
        model(x)  # no gradients: nothing is saved, nothing compared
    assert not checksums
    losses = [model(x).sum() for _ in range(2)]  # both calls come before the first backward
    for loss in losses:
        loss.backward(retain_graph=True)
    num_first = len(checksums)
    assert num_first > 0
    for loss in losses:
        loss.backward()
    gradients(model, x)
    assert len(checksums) == num_first


def test_a_step_that_ends_before_its_backward_leaves_the_comparison_to_the_next() -> None:
    calls = itertools.count()
    model, x = model_of("full", middle=lambda x: (x + next(calls)).exp()), torch.randn(4, WIDTH)
    model(x)
    with pytest.raises(activation.RecomputeMismatchError):
        model(x).sum().backward()


@pytest.mark.parametrize("make", [lambda: Stack(WIDTH), lambda: Nested(WIDTH), lambda: Normed(WIDTH)])
def test_dropout_batchnorm_and_nested_blocks_are_found_to_be_the_same(
    make: Callable[[], nn.Module], checksums: list[Tensor]
) -> None:
    model = activation.checkpoint(make())
    gradients(model, torch.randn(4, WIDTH))
    assert checksums


def test_checksums_see_bits_places_and_nothing_else() -> None:
    x = torch.randn(6, 10)
    assert torch.equal(checksum(x), checksum(x.t().contiguous().t()))
    assert torch.equal(checksum(x[1:, 1:7]), checksum(x[1:, 1:7].clone()))
    assert not torch.equal(checksum(x), checksum(x.flip(0)))
    assert not torch.equal(checksum(torch.tensor([0.0])), checksum(torch.tensor([-0.0])))
    nan = torch.full((3,), torch.nan)
    assert torch.equal(checksum(nan), checksum(nan.clone()))
    for kind in (torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64):
        one = torch.ones(5, dtype=kind)
        other = one.clone()
        other[3] = 0
        assert torch.equal(checksum(one), checksum(one.clone()))
        assert not torch.equal(checksum(one), checksum(other))
    assert checksum(torch.empty(0, 3)) is not None
    assert torch.equal(checksum(torch.ones(1, 4).expand(10**9, 4)), checksum(torch.ones(1, 4)))
    assert checksum(torch.empty(4, device="meta")) is None


class AddsToItsResult(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        with torch.no_grad():
            y.add_(1.0)
        return y * 2.0


@pytest.mark.parametrize("action", [None, "recompute", "selective"])
def test_a_saved_tensor_that_the_block_changes_in_place_is_refused_as_without_the_policy(
    action: str | None,
) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), AddsToItsResult())
    activation.apply_actions(model, {} if action is None else {"1": action})
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed .* in place"):
        model(torch.randn(2, WIDTH)).sum().backward()


@pytest.mark.parametrize(
    "actions", [{"1": "recompute"}, {"0": "recompute", "1": "recompute linked after C 0"}]
)
def test_an_input_that_the_block_changes_in_place_is_refused(actions: dict[str, str]) -> None:
    class AddsToItsInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.add_(1.0)).sin()

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), AddsToItsInput())
    activation.apply_actions(model, actions)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        gradients(model, torch.randn(4, WIDTH))


@pytest.mark.parametrize("policy", RERUN)
def test_a_bias_that_changes_between_forward_and_backward_is_refused(policy: str) -> None:
    model = model_of(policy)
    loss = model(torch.randn(2, WIDTH)).sum()
    with torch.no_grad():
        model.blocks[1].up.bias.add_(1.0)
    with pytest.raises(activation.RecomputeMismatchError, match=r"'blocks\.1' has a parameter 'up\.bias'"):
        loss.backward()


class LongEnd(nn.Module):
    """Takes long after its last saved tensor, and catches what it can."""

    def __init__(self, caught: type[BaseException]) -> None:
        super().__init__()
        self.linear, self.caught, self.num_caught = nn.Linear(WIDTH, WIDTH), caught, 0

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.linear(x)
        except self.caught:
            self.num_caught += 1
            y = self.linear(x.clone())
        for _ in range(30):
            y = y + 1
        return y


@pytest.mark.parametrize(("caught", "num_caught"), [(Exception, 0), (BaseException, 1)])
def test_a_block_that_catches_exceptions_may_be_stopped_early(
    caught: type[BaseException], num_caught: int
) -> None:
    model = activation.apply_actions(nn.Sequential(LongEnd(caught)), {"0": "recompute"})
    x = torch.randn(20_000, WIDTH)
    expected = gradients(model, x)  # sees how long the end takes
    found = gradients(model, x)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert model[0].num_caught == num_caught


def test_backwards_through_a_part_of_a_graph_leave_nothing_more_each_time() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x).exp(), self.two(x).exp()

    model = activation.apply_actions(nn.Sequential(Two()), {"0": "recompute"})
    with SavedActivationMeter(model) as meter:
        one, _two = model(torch.randn(64, WIDTH))
        held = []
        for _ in range(4):
            torch.autograd.grad(one.sum(), model[0].one.weight, retain_graph=True)
            held.append(meter.current_bytes)
    assert held == held[:1] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_functional_call_has_the_plain_gradients_of_the_tensors_that_it_was_given(policy: str) -> None:
    results = []
    for model in (Three(), model_of(policy)):
        generator = torch.Generator().manual_seed(1)
        given = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
        leaves = {name: value.requires_grad_() for name, value in given.items()}
        x = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)
        own = [parameter.detach().clone() for parameter in model.parameters()]
        torch.func.functional_call(model, leaves, (x,)).square().sum().backward()
        results.append([leaf.grad for leaf in leaves.values()])
        for parameter, value in zip(model.parameters(), own, strict=True):
            assert torch.equal(parameter, value)
            assert parameter.grad is None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_torch_func_is_right_or_refused_with_the_way_out(policy: str) -> None:
    model = model_of(policy)
    x = torch.randn(4, WIDTH)
    refused = pytest.raises(ConfigError, match=r"'blocks\.0' was called inside .*uncheckpoint")
    with refused:
        torch.func.jacrev(model)(x)
    with refused:
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(
            dict(model.named_parameters())
        )
    if policy == "selective":
        assert torch.equal(torch.func.vmap(model)(x[:, None])[:, 0], model(x))
    else:
        with refused:
            torch.func.vmap(model)(x[:, None])
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    gradients(model, x)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_many_outputs_at_once_and_double_backward_equal_the_plain_models(policy: str) -> None:
    results = []
    for actions in ({}, POLICIES[policy]):
        torch.manual_seed(0)
        model = Three(middle=lambda x: nn.functional.dropout(x, 0.5).tanh())
        activation.apply_actions(model, actions)
        x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH).requires_grad_()
        y = model(x)
        leaves = [x, *model.parameters()]
        rows = torch.eye(y.numel()).view(-1, *y.shape)
        found = torch.autograd.grad(y, leaves, rows, is_grads_batched=True, retain_graph=True)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append([*found, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
