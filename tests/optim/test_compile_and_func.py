"""torch.compile'd models, compiled steps and torch.func beside a native optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mlsys_engine.optim import AdamW
from tests.optim.variants import EPSILON


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step: int) -> Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step))


def assert_close(ours: nn.Module, theirs: nn.Module, steps: int) -> None:
    # Updates of at most lr = 0.05 whose gradients are sums of 16 terms: a few dozen roundings a step.
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ((a - b).abs() <= 100 * steps * EPSILON * (1.0 + b.abs())).all()


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_a_compiled_model_trains_as_with_torch(backend: str) -> None:
    ours, theirs = model(), model()
    compiled = torch.compile(ours, backend=backend)
    optimizer = AdamW(compiled.parameters(), lr=0.05)
    peer = torch.optim.AdamW(theirs.parameters(), lr=0.05)
    for step in range(4):
        for net, one in ((compiled, optimizer), (theirs, peer)):
            net(batch(step)).square().mean().backward()
            one.step()
            one.zero_grad()
    assert_close(ours, theirs, 4)


def test_a_compiled_training_step_may_contain_the_native_step() -> None:
    ours, theirs = model(), model()
    optimizer, peer = AdamW(ours.parameters(), lr=0.05), torch.optim.AdamW(theirs.parameters(), lr=0.05)

    @torch.compile(backend="eager")
    def train_step(x: Tensor) -> Tensor:
        loss = ours(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for step in range(3):
        train_step(batch(step))
        theirs(batch(step)).square().mean().backward()
        peer.step()
        peer.zero_grad()
    assert_close(ours, theirs, 3)


def test_functional_calls_and_gradients_see_stepped_weights() -> None:
    ours, theirs = model(), model()
    nets = [
        (ours, AdamW(ours.parameters(), lr=0.05)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.05)),
    ]
    for step in range(3):
        for net, optimizer in nets:
            weights = dict(net.named_parameters())

            def loss(values: dict[str, Tensor], net: nn.Module = net, step: int = step) -> Tensor:
                return torch.func.functional_call(net, values, (batch(step),)).square().mean()

            detached = {name: weight.detach() for name, weight in weights.items()}
            for name, gradient in torch.func.grad(loss)(detached).items():
                weights[name].grad = gradient
            optimizer.step()
    assert_close(ours, theirs, 3)


def test_an_ensemble_stacked_by_torch_func_steps_as_its_members() -> None:
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(model().requires_grad_(True))
        for parameter in members[-1].parameters():
            parameter.data.add_(0.1 * seed)
    stacked, _ = torch.func.stack_module_state(copy.deepcopy(members))
    skeleton = copy.deepcopy(members[0]).to("meta")
    together = AdamW(stacked.values(), lr=0.05)
    alone = [AdamW(member.parameters(), lr=0.05) for member in members]

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, values, (x,)).square().mean()

    for step in range(3):
        torch.func.vmap(loss, in_dims=(0, None))(stacked, batch(step)).sum().backward()
        together.step()
        together.zero_grad()
        for member, optimizer in zip(members, alone, strict=True):
            member(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, values in stacked.items():
        for value, member in zip(values, members, strict=True):
            other = member.get_parameter(name)
            # Batched and single matrix products add 16 terms in another order.
            assert ((value - other).abs() <= 100 * 3 * EPSILON * (1.0 + other.abs())).all()
