"""From the third step on one native look decides whether anything has changed: it must see all that has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mlsys_engine.errors import CheckpointError, ConfigError
from mlsys_engine.native import load_tensors
from mlsys_engine.optim import AdamW, distributed
from tests.optim import arenas

SHAPES = ((3, 4), (70,), (), (0,), (2, 1, 5), (4, 4))
Edit = Callable[[AdamW, list[nn.Parameter]], None]


def parameters(count: int = 1) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES * count]


def new_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def stepped(params: list[nn.Parameter], optimizer: AdamW, num_steps: int) -> None:
    for number in range(num_steps):
        new_gradients(params, number)
        optimizer.step()


def forgetful_step(optimizer: AdamW) -> None:
    """A step that builds everything anew."""
    optimizer._plan = None
    optimizer.step()


def refuse(*_: Any) -> None:
    raise AssertionError("step_on() was called")


@pytest.mark.parametrize("in_arena", [False, True])
def test_steps_on_new_gradients_are_taken_after_one_look_with_the_bits_of_steps_built_anew(
    monkeypatch: pytest.MonkeyPatch, in_arena: bool
) -> None:
    fast, slow = parameters(20), parameters(20)
    optimizer, anew = AdamW(fast), AdamW(slow)
    if in_arena:
        named, params, grads = arenas.build(SHAPES)
        fast, slow = [parameter for _, parameter in named], parameters()
        for source, target in zip(slow, fast, strict=True):
            target.data.copy_(source.detach())
        optimizer, anew = AdamW(named), AdamW(slow)
        optimizer.adopt(params, grads)
    for number in range(6):
        new_gradients(slow, number)
        for source, target in zip(slow, fast, strict=True):
            if in_arena:
                assert target.grad is not None
                target.grad.copy_(source.grad)
            else:
                target.grad = copy.deepcopy(source.grad)
        if number == 2:
            monkeypatch.setattr(optimizer, "step_on", refuse)
        optimizer.param_groups[0]["lr"] = anew.param_groups[0]["lr"] = 0.01 * (number + 1)
        scale = {} if number % 2 else {"grad_scale": 0.5}
        optimizer.step_scaled(**scale, zero_grad=in_arena)
        anew._plan = None
        anew.step_scaled(**scale)
        assert all(map(torch.equal, fast, slow))
        if not in_arena:  # whose views share one count
            assert [parameter._version for parameter in fast] == [parameter._version for parameter in slow]
    if in_arena:
        assert not any(parameter.grad.any() for parameter in fast)


def drop_a_gradient(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    params[1].grad = None


def narrow_a_gradient(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    params[1].grad_dtype = None
    params[1].grad = params[1].grad.bfloat16()


def lay_a_gradient_out_otherwise(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    params[5].grad = params[5].grad.t().contiguous().t()


def negate_a_gradient_lazily(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    params[1].grad = torch.randn(70, 2, generator=torch.Generator().manual_seed(1)).view(70, 2)[:, 0]
    params[1].grad = torch._neg_view(params[1].grad.contiguous())


def replace_data(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    params[0].data = torch.full((3, 4), 0.5)


def transpose_in_place(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    params[5].data = params[5].data.t()


def swap_two(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    torch.utils.swap_tensors(params[5], nn.Parameter(torch.ones(4, 4)))
    params[5].grad = torch.full((4, 4), 0.25)


def replace_a_moment(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["exp_avg"] = torch.ones(3, 4)


def move_a_moment(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["exp_avg"].data = torch.ones(3, 4)


def replace_the_count(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["step"] = torch.tensor(7.0)


def replace_the_state_of_one(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]] = copy.deepcopy(optimizer.state[params[0]])
    optimizer.state[params[0]]["exp_avg"].fill_(1.0)


def switch_amsgrad_on(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["amsgrad"] = True
    for parameter in params:
        if state := optimizer.state.get(parameter):
            state["max_exp_avg_sq"] = torch.ones_like(parameter)


def pass_the_list_as_a_tuple(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])


def reorder(optimizer: AdamW, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["params"].reverse()


EDITS = [
    drop_a_gradient,
    narrow_a_gradient,
    lay_a_gradient_out_otherwise,
    negate_a_gradient_lazily,
    replace_data,
    transpose_in_place,
    swap_two,
    replace_a_moment,
    move_a_moment,
    replace_the_count,
    replace_the_state_of_one,
    switch_amsgrad_on,
    pass_the_list_as_a_tuple,
    reorder,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_what_changes_after_many_like_steps_is_taken_as_by_a_step_built_anew(edit: Edit) -> None:
    runs = []
    for take in (AdamW.step, forgetful_step):
        params = parameters()
        optimizer = AdamW(params)
        stepped(params, optimizer, 4)
        new_gradients(params, 9)
        edit(optimizer, params)
        take(optimizer)
        new_gradients(params, 10)
        take(optimizer)
        runs.append([parameter.detach() for parameter in params])
    assert all(map(torch.equal, *runs))


def test_a_lazily_negated_gradient_is_stepped_as_its_values() -> None:
    lazy, plain = parameters(), parameters()
    for params in (lazy, plain):
        optimizer = AdamW(params)
        stepped(params, optimizer, 3)
        negative = torch._neg_view(params[1].grad)
        params[1].grad = negative if params is lazy else negative.resolve_neg()
        optimizer.step()
    assert all(map(torch.equal, lazy, plain))


def test_a_parameter_cut_short_at_its_place_is_refused_and_not_stepped_past_its_end() -> None:
    params = parameters()
    optimizer = AdamW(params)
    stepped(params, optimizer, 3)
    params[1].data = params[1].data[:50]
    params[1].grad = torch.ones(50)
    with pytest.raises(CheckpointError, match=r"exp_avg has shape \(70,\)"):
        optimizer.step()


def test_a_gradient_that_is_shorter_than_its_enlarged_parameter_is_refused() -> None:
    params = parameters()
    optimizer = AdamW(params)
    stepped(params, optimizer, 3)
    optimizer.state.pop(params[1])
    params[1].data = torch.ones(700)
    with pytest.raises(ConfigError, match="gradient of parameter 1 of group 0"):
        optimizer.step()


def test_the_norm_of_gradients_read_in_one_look_has_the_bits_of_the_plain_sum() -> None:
    params = parameters(20)
    optimizer = AdamW([{"params": params[:5]}, {"params": params[5:]}])
    new_gradients(params, 1)
    params[7].grad = None
    found = load_tensors().gradient_spans([group["params"] for group in optimizer.param_groups])
    assert found.spans.tolist() == [[p.grad.data_ptr(), p.numel()] for p in params if p.grad is not None]
    expected = distributed.sum_of_squares(params, optimizer.name_of)
    assert torch.equal(optimizer.sum_of_squares(), expected)


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones(5, 4).t(),
        torch.ones(4, 5).to_sparse(),
        torch.ones(4, 5, dtype=torch.bfloat16),
        torch._neg_view(torch.ones(4, 5)),
        None,
    ],
    ids=["strided", "sparse", "narrow", "negated", "absent"],
)
def test_gradients_that_one_look_cannot_judge_are_left_to_python(gradient: torch.Tensor | None) -> None:
    parameter, other = nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(4))
    parameter.grad_dtype = None
    parameter.grad = gradient
    other.grad = torch.ones(4) if gradient is not None else None
    assert load_tensors().gradient_spans([[parameter, other]]) is None
    total = AdamW([parameter, other]).sum_of_squares()
    # torch sums what is sparse: the square of a rounded root, 3 roundings of 2^-53 each.
    assert float(total) == pytest.approx(0.0 if gradient is None else 24.0, rel=2.0**-51, abs=0.0)


def test_versions_are_incremented_as_torch_does_it() -> None:
    tensors = [torch.ones(2) for _ in range(70)]
    with torch.inference_mode():
        tensors.append(torch.ones(2))
    load_tensors().increment_versions(tensors)
    torch.autograd.graph.increment_version(tensors)
    assert {tensor._version for tensor in tensors[:-1]} == {2}
    with pytest.raises(TypeError, match="tensor is expected"):
        load_tensors().increment_versions([1])
