"""What every registered optimizer must do. A new line in the registry is tested here on arrival."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import OPTIMIZERS
from mlsys_engine.optim.reference import REFERENCES
from tests.optim.peers import make_peer
from tests.optim.variants import (
    EPSILON,
    UPDATE_ERRORS,
    VARIANTS,
    error_bounds,
    every_variant,
    gradients_for,
    lion_may_flip,
    make,
)

SHAPES = ((), (1,), (3, 5), (0,), (17,), (64, 3), (4099,))  # scalar, one, odd, empty, longer than one chunk


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def run(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int, first_seed: int = 0
) -> None:
    for step in range(first_seed, first_seed + steps):
        for number, parameter in enumerate(params):
            parameter.grad = gradients_for(parameter.shape, 1, seed=1000 * step + number)[0]
        optimizer.step()


def assert_same(left: list[Any], right: list[Any]) -> None:
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"tensor {number} differs by {(a - b).abs().max()}"


def test_every_registered_optimizer_has_variants_a_reference_and_a_bound() -> None:
    assert set(OPTIMIZERS) == set(VARIANTS) == set(REFERENCES) == set(UPDATE_ERRORS)


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_a_hundred_steps_stay_within_the_derived_bound_of_the_float64_reference(
    name: str, variant: dict[str, Any]
) -> None:
    params = parameters()
    optimizer = make(name, params, variant)
    doubles = [parameter.detach().double() for parameter in params]
    states: list[dict[str, Any]] = [{} for _ in params]
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    largest = 0.0
    flips = [torch.zeros(parameter.shape) for parameter in params]
    for step in range(100):
        run(optimizer, params, 1, first_seed=step)
        for number, parameter in enumerate(params):
            assert parameter.grad is not None
            doubles[number] = REFERENCES[name](
                doubles[number], parameter.grad.double(), states[number], groups[parameter]
            )
            largest = max(largest, doubles[number].abs().max().item() if parameter.numel() else 0.0)
            if name == "lion":
                flips[number] += lion_may_flip(groups[parameter], states[number]["mixed"], largest=2.0)
        bounds = error_bounds(
            name, optimizer, params, steps=step + 1, smallest=0.5, largest=2.0, parameter=largest
        )
        for parameter, double, flipped, bound in zip(params, doubles, flips, bounds, strict=True):
            assert ((parameter.double() - double).abs() <= bound + 2 * variant["lr"] * flipped).all()
    assert sum(flipped.sum().item() for flipped in flips) <= 0.01 * 100 * sum(map(torch.numel, params))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_one_step_equals_torch_to_a_few_roundings(name: str, variant: dict[str, Any], fused: bool) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = make(name, ours, variant)
    run(optimizer, ours, 1)
    run(make_peer(name, theirs, variant, fused=fused), theirs, 1)
    whole = error_bounds(name, optimizer, ours, steps=1, smallest=0.5, largest=2.0, parameter=4.0)
    for a, b, bound_of_whole in zip(ours, theirs, whole, strict=True):
        # Either side rounds an update of at most lr * max(1, |g'|) up to 10 times and the parameter twice.
        elementwise = EPSILON * (2 * 10 * variant["lr"] * (2.0 + b.abs()) + 2 * 2 * b.abs())
        assert ((a - b).abs() <= (elementwise if optimizer.elementwise else 2 * bound_of_whole)).all()


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_state_moves_from_torch_and_back_to_torch(name: str, variant: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    our_optimizer, their_optimizer = make(name, ours, variant), make_peer(name, theirs, variant)
    run(their_optimizer, theirs, 5)
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b.data)
    our_optimizer.load_state_dict(copy.deepcopy(their_optimizer.state_dict()))
    run(our_optimizer, ours, 5, first_seed=5)
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    saved = copy.deepcopy(our_optimizer.state_dict())
    # The same keys, types and shapes as torch's own.
    mine, peer = saved["state"], their_optimizer.state_dict()["state"]
    assert mine.keys() == peer.keys()
    for key in mine:
        assert {k: (v.dtype, v.shape) for k, v in mine[key].items()} == {
            k: (v.dtype, v.shape) for k, v in peer[key].items()
        }
    assert set(saved["param_groups"][0]) >= set(their_optimizer.state_dict()["param_groups"][0])
    their_optimizer.load_state_dict(saved)
    run(their_optimizer, theirs, 5, first_seed=10)
    run(our_optimizer, ours, 5, first_seed=10)
    bounds = error_bounds(name, our_optimizer, ours, steps=5, smallest=0.5, largest=2.0, parameter=8.0)
    for a, b, bound in zip(ours, theirs, bounds, strict=True):
        assert ((a - b).abs() <= 2 * bound).all()


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_restored_state_continues_with_the_same_bits(name: str, variant: dict[str, Any]) -> None:
    straight = parameters()
    optimizer = make(name, straight, variant)
    run(optimizer, straight, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    restored = [torch.nn.Parameter(parameter.detach().clone()) for parameter in straight]
    again = make(name, restored, {"lr": 123.0})
    again.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, straight, 3, first_seed=3)
    run(again, restored, 3, first_seed=3)
    assert_same(straight, restored)


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_deepcopy_and_pickle_continue_with_the_same_bits(name: str, variant: dict[str, Any]) -> None:
    params = parameters()
    optimizer = make(name, params, variant)
    run(optimizer, params, 3)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    run(optimizer, params, 3, first_seed=3)
    for other in copies:
        copied = dict(zip(optimizer._parameters(), other._parameters(), strict=True))
        others = [copied[parameter] for parameter in params]
        run(other, others, 3, first_seed=3)
        assert_same(params, others)


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_scaled_step_equals_a_step_on_scaled_gradients(name: str, variant: dict[str, Any]) -> None:
    scaled, plain = parameters(), parameters()
    scaling, stepping = make(name, scaled, variant), make(name, plain, variant)
    for step in range(3):
        for number, (a, b) in enumerate(zip(scaled, plain, strict=True)):
            a.grad = gradients_for(a.shape, 1, seed=step * 100 + number)[0]
            b.grad = a.grad * 0.3
        kept = [a.grad.clone() for a in scaled if a.grad is not None]
        scaling.step_scaled(grad_scale=torch.tensor(0.3, dtype=torch.float64))
        stepping.step()
        assert_same(kept, [a.grad for a in scaled])
    assert_same(scaled, plain)


@pytest.mark.parametrize("skip", [True, torch.tensor(True), torch.tensor(1.0)])
@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_skipped_step_changes_nothing_at_all(name: str, variant: dict[str, Any], skip: Any) -> None:
    params, untouched = parameters(), parameters()
    optimizer, other = make(name, params, variant), make(name, untouched, variant)
    for parameter in params:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step_scaled(skip=skip)
    assert_same(params, untouched)
    assert optimizer.state_dict()["state"] == {}
    run(optimizer, params, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step_scaled(skip=skip)
    after = optimizer.state_dict()["state"]
    for key, state in before.items():
        assert_same(list(state.values()), list(after[key].values()))
    run(other, untouched, 2)
    assert_same(params, untouched)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_non_finite_gradients_give_what_torch_gives(name: str, variant: dict[str, Any], bad: float) -> None:
    ours, theirs = ([torch.nn.Parameter(torch.ones(37))] for _ in range(2))
    our_optimizer, their_optimizer = make(name, ours, variant), make_peer(name, theirs, variant)
    for _ in range(2):
        for parameter in (*ours, *theirs):
            parameter.grad = torch.full((37,), 0.5)
            parameter.grad[3] = bad
            parameter.grad[36] = bad
        our_optimizer.step()
        their_optimizer.step()
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    assert torch.equal(ours[0].isinf(), theirs[0].isinf())
    assert ours[0][:3].isfinite().all()
    assert ours[0][4:36].isfinite().all()


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_parameters_without_gradients_are_left_alone_and_their_counts_wait(
    name: str, variant: dict[str, Any]
) -> None:
    ours, theirs = parameters(), parameters()
    our_optimizer, their_optimizer = make(name, ours, variant), make_peer(name, theirs, variant)
    for step in range(6):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            gradient = gradients_for(pair[0].shape, 1, seed=step * 100 + number)[0]
            for parameter in pair:
                parameter.grad = gradient.clone() if (step + number) % 3 else None
        our_optimizer.step()
        their_optimizer.step()
    bounds = error_bounds(name, our_optimizer, ours, steps=6, smallest=0.5, largest=2.0, parameter=8.0)
    for a, b, bound in zip(ours, theirs, bounds, strict=True):
        assert ((a - b).abs() <= 2 * bound).all()


@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_unaligned_and_strided_views_step_like_plain_tensors(name: str, variant: dict[str, Any]) -> None:
    base = torch.randn(2000)
    plain = [torch.nn.Parameter(base[1:1000].clone()), torch.nn.Parameter(base[1000:1900:3].clone())]
    plain += [torch.nn.Parameter(base[:600].clone().view(20, 30).t().clone())]
    storage = base.clone()
    matrix = torch.nn.Parameter(base[:600].clone().view(20, 30).t())  # dense, column-major
    views = [torch.nn.Parameter(storage[1:1000]), torch.nn.Parameter(storage[1000:1900:3]), matrix]
    first, second = make(name, plain, variant), make(name, views, variant)
    for step in range(3):
        for number, (a, b) in enumerate(zip(plain, views, strict=True)):
            a.grad = gradients_for(a.shape, 1, seed=step * 10 + number)[0]
            b.grad = a.grad.clone()  # contiguous: not the layout of the column-major parameter
        first.step()
        second.step()
    assert_same(plain, views)
    assert torch.equal(storage[1001:1900:3], base[1001:1900:3])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_without_parameters_is_refused(name: str) -> None:
    for empty in ([], iter([]), [{"params": []}], [{"params": iter([])}]):
        with pytest.raises(ConfigError, match="optimizer without parameters"):
            make(name, empty, {"lr": 0.1})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_that_cannot_be_stepped_are_refused_by_name_with_what_to_do(name: str) -> None:
    for dtype, advice in (
        (torch.float64, "float32"),
        (torch.complex64, "view_as_real"),
    ):
        with pytest.raises(ConfigError, match=rf"layer\.weight is .*{advice}"):
            make(name, [("layer.weight", torch.nn.Parameter(torch.zeros(3, dtype=dtype)))], {"lr": 0.1})
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = make(name, [parameter], {"lr": 0.1})
    with pytest.raises(ConfigError, match="Parameter 0 of group 1 is float64"):
        optimizer.add_param_group({"params": torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients_are_refused_before_anything_changes(name: str) -> None:
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    other = torch.nn.Parameter(torch.ones(3))
    other.grad = torch.ones(3)
    optimizer = make(name, [("bias", other), *embedding.named_parameters()], {"lr": 0.1})
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"gradient of weight is torch\.sparse_coo"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bad_hyper_parameters_are_refused_in_constructor_groups_and_loaded_state(name: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    for bad in ({"lr": -1.0}, {"lr": float("nan")}, {"lr": torch.ones(2)}, {"weight_decay": -0.1}):
        with pytest.raises(ConfigError):
            make(name, [parameter], bad)
        with pytest.raises(ConfigError):
            make(name, [{"params": [parameter], **bad}], {})
    optimizer = make(name, [parameter], {"lr": 0.1})
    saved = optimizer.state_dict()
    saved["param_groups"][0]["differentiable"] = True
    with pytest.raises(ConfigError, match="differentiable"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_rules_of_construction_hold(name: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError):
        make(name, parameter, {"lr": 0.1})
    with pytest.raises(ValueError, match="more than one parameter group"):
        make(name, [{"params": [parameter]}, {"params": [parameter]}], {"lr": 0.1})
    named = make(name, [("weight", parameter)], {"lr": 0.1})
    assert named.param_groups[0]["param_names"] == ["weight"]
