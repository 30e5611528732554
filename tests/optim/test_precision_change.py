"""State under one `master` and `moments` loads under any other; state_dict() has float32 values in all."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine.optim import NativeOptimizer, optimizer_class
from mlsys_engine.optim.state import ensure_state
from tests.optim.peers import TORCH_PEERS, make_peer
from tests.optim.variants import ELEMENTWISE, VARIANTS, gradients_for, make

SHAPES = ((5, 13), (130,), (4, 33), (0,), ())
MASTERS = (None, "split", "fp32")
MOMENTS = ("fp32", "bf16", "int8")


def params(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def run(optimizer: NativeOptimizer, owned: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(owned):
            gradient = gradients_for(tuple(parameter.shape), 1, seed=10 * step + index)[0]
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def saved_and_loaded(optimizer: NativeOptimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def options(name: str, master: str | None, moments: str) -> dict[str, Any]:
    return {**VARIANTS[name][-1], "master": master, "moments": moments}


def copied(owned: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().clone()) for parameter in owned]


def converted(optimizer: NativeOptimizer, owned: list[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
    """The saved state after it was laid out as the next step needs it."""
    ensure_state(optimizer, owned, range(len(owned)))
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return state


def largest_of_blocks(value: Tensor) -> Tensor:
    """For each element the largest magnitude among the 64 that it shares a scale with."""
    flat = value.reshape(-1)
    padded = torch.zeros(-(-flat.numel() // 64) * 64)
    padded[: flat.numel()] = flat.abs()
    blocks = padded.view(-1, 64)
    largest = blocks.amax(1, keepdim=True).expand_as(blocks) if len(blocks) else blocks
    return largest.reshape(-1)[: flat.numel()].view(value.shape)


FORMS = [(master, moments) for master in MASTERS for moments in MOMENTS]


@pytest.mark.parametrize(("master", "moments"), FORMS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_state_saved_in_any_form_continues_in_it_with_the_same_bits(
    name: str, master: str | None, moments: str
) -> None:
    straight = params()
    optimizer = make(name, straight, options(name, master, moments))
    run(optimizer, straight, range(3))
    restored = copied(straight)
    again = make(name, restored, options(name, master, moments))
    again.load_state_dict(saved_and_loaded(optimizer))
    run(optimizer, straight, range(3, 6))
    run(again, restored, range(3, 6))
    assert all(map(torch.equal, straight, restored))
    left, right = optimizer.state_dict()["state"], again.state_dict()["state"]
    for key, state in left.items():
        assert all(torch.equal(value, right[key][item]) for item, value in state.items())


@pytest.mark.parametrize(("before", "after"), [("split", "fp32"), ("fp32", "split")])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_split_and_fp32_masters_are_exchanged_without_losing_a_bit(
    name: str, before: str, after: str
) -> None:
    straight = params()
    optimizer = make(name, straight, options(name, before, "fp32"))
    run(optimizer, straight, range(3))
    changed = copied(straight)
    other = make(name, changed, options(name, after, "fp32"))
    saved = saved_and_loaded(optimizer)
    for group in saved["param_groups"]:
        group["master"] = after
    other.load_state_dict(saved)
    run(optimizer, straight, range(3, 8))
    run(other, changed, range(3, 8))
    assert all(map(torch.equal, straight, changed))
    left, right = optimizer.state_dict()["state"], other.state_dict()["state"]
    for key, state in left.items():
        assert torch.equal(state["master"], right[key]["master"])


def changes() -> list[Any]:
    """Every form into every other with AdamW; with the other rules each form into one other."""
    made = []
    for name in ELEMENTWISE:
        for number, source in enumerate(FORMS):
            targets = FORMS if name == "adamw" else [FORMS[(2 * number + 4) % len(FORMS)]]
            made += [pytest.param(name, source, target, id=f"{name}-{source}-{target}") for target in targets]
    return made


@pytest.mark.parametrize(("name", "source", "target"), changes())
def test_state_of_any_form_loads_into_any_other_within_one_rounding(
    name: str, source: tuple[str | None, str], target: tuple[str | None, str]
) -> None:
    owned = params()
    optimizer = make(name, owned, options(name, *source))
    run(optimizer, owned, range(3))
    saved = saved_and_loaded(optimizer)
    others = copied(owned)
    loading = make(name, others, options(name, *target))
    for group in saved["param_groups"]:
        group["master"], group["moments"] = target
    loading.load_state_dict(copy.deepcopy(saved))
    result = converted(loading, others)
    moments = loading.moment_names(loading.param_groups[0])
    for index, state in saved["state"].items():
        for key in moments:
            value, loaded = state[key], result[index][key]
            assert value.dtype is loaded.dtype is torch.float32
            bound = 0.0 * value
            if key in loading.moment_kinds and target[1] == "bf16":
                bound = 2.0**-8 * value.abs()
            if key in loading.moment_kinds and target[1] == "int8":
                # Three bits behind the leading one, and below that a step of the block's largest.
                bound = 2.0**-4 * value.abs() + 2.0**-14 * largest_of_blocks(value)
            assert ((loaded - value).abs() <= bound).all()
        if target[0] is None:
            assert "master" not in result[index]
        else:
            assert torch.equal(result[index]["master"], state.get("master", owned[index].detach().float()))
        assert result[index].get("step") == state.get("step", result[index].get("step"))
    run(loading, others, range(3, 4))
    assert all(parameter.isfinite().all() for parameter in others)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("name", TORCH_PEERS)
def test_float32_state_of_torch_loads_into_narrow_moments_and_back(name: str, moments: str) -> None:
    owned = params(torch.float32)
    ours = make(name, owned, {**VARIANTS[name][-1], "moments": moments})
    theirs = copied(owned)
    peer = make_peer(name, theirs, VARIANTS[name][-1])
    for parameter, other in zip(owned, theirs, strict=True):
        parameter.grad = other.grad = torch.ones_like(other)
    peer.step()
    taken = {**copy.deepcopy(peer.state_dict()), "param_groups": ours.state_dict()["param_groups"]}
    ours.load_state_dict(taken)
    ours.step()
    saved = saved_and_loaded(ours)
    peer.load_state_dict(saved)
    peer.step()
    for index, state in peer.state_dict()["state"].items():
        for key, value in state.items():
            assert value.dtype is torch.float32
            assert value.shape == saved["state"][index][key].shape


# Rules that count no steps save no count either, from which the random numbers of another form would go on.
COUNTING = [param for param in changes() if optimizer_class(param.values[0]).counts_steps]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source", "target"), COUNTING)
def test_a_group_edited_to_another_form_continues_as_if_loaded_into_it(
    name: str, source: tuple[str | None, str], target: tuple[str | None, str]
) -> None:
    edited = params()
    optimizer = make(name, edited, options(name, *source))
    run(optimizer, edited, range(2))
    saved = saved_and_loaded(optimizer)
    loaded = copied(edited)
    other = make(name, loaded, options(name, *target))
    for group in (*saved["param_groups"], *optimizer.param_groups):
        group["master"], group["moments"] = target
    other.load_state_dict(saved)
    run(optimizer, edited, range(2, 4))
    run(other, loaded, range(2, 4))
    assert all(map(torch.equal, edited, loaded))
