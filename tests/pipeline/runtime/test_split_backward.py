from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from mlsys_engine.pipeline.runtime.split_backward import SplitBackward


class _Mixed(nn.Module):
    """A weight that is used twice, one as itself and transposed, norms, scales, in-place operations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.twice = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.scale = nn.Parameter(torch.randn(16))
        self.shift = nn.Parameter(torch.randn(16))
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + functional.relu(self.twice(self.norm(x)), inplace=True)
        x = x + self.twice(x) * self.scale
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = torch.addmm(self.shift, x.reshape(-1, 16), self.weight).tanh() @ self.weight.t()
        x = x.clone()
        x += self.shift
        return functional.linear(x, self.embed.weight)


def _loss(model, ids):
    return functional.cross_entropy(model(ids), ids.reshape(-1), reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_halves_give_the_bits_of_a_whole_backward_over_several_microbatches(dtype):
    torch.manual_seed(0)
    whole = _Mixed().to(dtype)
    halves = copy.deepcopy(whole)
    batches = [torch.randint(0, 11, (3, 7)) for _ in range(3)]
    for ids in batches:
        _loss(whole, ids).backward()
    modes = []
    for ids in batches:
        with SplitBackward() as mode:
            loss = _loss(halves, ids)
        loss.backward()
        assert all(parameter.grad is None for parameter in halves.parameters())
        modes.append(mode)
    for mode in modes:
        mode.weights()
    for (name, expected), found in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert torch.equal(expected.grad, found.grad), name


def test_hooks_on_a_parameter_run_once_a_microbatch_and_in_the_second_half():
    model, calls = nn.Linear(4, 4), []
    model.weight.register_post_accumulate_grad_hook(calls.append)
    model.weight.register_hook(lambda gradient: calls.append("of the gradient"))
    with SplitBackward() as mode:
        loss = model(model(torch.ones(2, 4))).sum()
    loss.backward()
    assert not calls
    mode.weights()
    assert calls == ["of the gradient", model.weight]


def test_a_first_term_is_what_the_sum_of_a_microbatch_begins_with():
    torch.manual_seed(0)
    model, x, term = nn.Linear(4, 4), torch.randn(2, 4), torch.randn(4, 4)
    model.weight.grad = torch.randn(4, 4)
    before = model.weight.grad.clone()
    own = torch.autograd.grad(model(x).sum(), model.weight)[0]
    with SplitBackward() as mode:
        loss = model(x).sum()
    loss.backward()
    mode.weights({model.weight: term})
    assert torch.equal(model.weight.grad, before + (term + own))


def test_a_weight_that_is_left_whole_has_its_gradient_after_the_first_half():
    model = nn.Linear(4, 4)
    with SplitBackward(whole=[model.weight]) as mode:
        loss = model(torch.ones(2, 4)).sum()
    loss.backward()
    assert model.weight.grad is not None and model.bias.grad is None
    mode.weights()
    assert model.bias.grad is not None


def test_without_gradients_nothing_is_kept():
    model = nn.Linear(4, 4)
    with SplitBackward() as mode, torch.no_grad():
        assert not model(torch.ones(2, 4)).requires_grad
    mode.weights()
    assert model.weight.grad is None
