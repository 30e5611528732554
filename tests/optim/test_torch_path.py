"""Devices without native kernels: torch's own implementation steps them, announced once."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import OPTIMIZERS, SGD, base, device_steps, norms
from mlsys_engine.optim.rules import adafactor, muon
from tests.optim.variants import EPSILON, error_bounds, every_variant, gradients_for, make


@pytest.fixture
def no_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (adafactor, base, device_steps, muon, norms):
        monkeypatch.setattr(module, "is_native", lambda device: False)


@pytest.mark.usefixtures("no_native_kernels")
@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_torch_path_agrees_with_the_kernels_and_is_announced_once(
    name: str, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = [torch.nn.Parameter(torch.ones(7)), torch.nn.Parameter(torch.ones(3, 4))]
    native = copy.deepcopy(slow)
    optimizer, kernels = make(name, slow, variant), make(name, native, variant)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            for number, (a, b) in enumerate(zip(slow, native, strict=True)):
                a.grad = gradients_for(a.shape, 1, seed=step * 10 + number)[0]
                b.grad = a.grad.clone()
            optimizer.step_scaled(grad_scale=0.5)
            optimizer.step_scaled(skip=torch.tensor(True))
            with monkeypatch.context() as patch:
                for module in (adafactor, base, device_steps, muon):
                    patch.setattr(module, "is_native", lambda device: True)
                kernels.step_scaled(grad_scale=0.5)
    assert sum("no native kernels for cpu" in str(warning.message) for warning in caught) == 1
    bounds = error_bounds(name, optimizer, slow, steps=4, smallest=0.25, largest=1.0, parameter=2.0)
    for a, b, bound in zip(slow, native, bounds, strict=True):
        assert ((a - b).abs() <= 2 * bound).all()
    assert optimizer.state_dict()["state"].keys() == kernels.state_dict()["state"].keys()


@pytest.mark.usefixtures("no_native_kernels")
@pytest.mark.filterwarnings("ignore:.*no native kernels")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_on_the_torch_path_the_rate_may_be_a_tensor_as_well(name: str) -> None:
    by_number, by_tensor = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    for parameter, rate in ((by_number, 0.125), (by_tensor, torch.tensor(0.125))):
        parameter.grad = gradients_for((3, 4), 1, seed=0)[0]
        make(name, [parameter], {"lr": rate}).step()
    # At most the update's product with the rate is rounded otherwise, of values of a few units.
    assert (by_number - by_tensor).abs().max() <= 4 * EPSILON
    assert not torch.equal(by_number, torch.ones(3, 4))


@pytest.mark.usefixtures("no_native_kernels")
@pytest.mark.filterwarnings("ignore:.*no native kernels")
def test_a_rule_that_torch_cannot_step_is_refused_on_the_torch_path() -> None:
    class KernelsOnly(SGD):
        torch_step = base.NativeOptimizer.torch_step

    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    with pytest.raises(ConfigError, match=r"KernelsOnly has parameters on cpu.*no torch_step"):
        KernelsOnly([parameter]).step()
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.usefixtures("no_native_kernels")
def test_norm_on_the_torch_path_sums_all_gradients() -> None:
    tensors = [torch.full((3,), 2.0), torch.full((2, 2), 3.0)]
    assert norms.sum_of_squares(tensors).item() == pytest.approx(48.0, rel=8 * 2.0**-53)
