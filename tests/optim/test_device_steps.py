"""The device side of a step without a device: what the launch is given, played back on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mlsys_engine.optim import device_steps, kernels, plan
from mlsys_engine.optim.segments import total_chunks
from tests.optim import arenas
from tests.optim.variants import every_variant, make

SHAPES = ((3, 5), (0,), (17,), (5000,))


class Launch:
    """Stands for the operator's `device` overload: reads skip and scale from `control` like the kernel."""

    def __init__(self, rule: str) -> None:
        self._operator: Callable[..., None] = kernels.step_operator(rule)

    def device(
        self,
        table: torch.Tensor,
        hyper: torch.Tensor,
        steps: torch.Tensor,
        control: torch.Tensor,
        chunks: int,
    ) -> None:
        assert chunks == total_chunks(table)
        assert control.dtype == hyper.dtype == torch.float64
        if control[1] == 0:
            self._operator(table, hyper, steps, control[0].item())


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize(("name", "variant"), every_variant())
def test_device_step_gives_the_launch_what_the_cpu_step_uses(
    name: str, variant: dict[str, Any], adopted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, params, grads = arenas.build(SHAPES)
    plain = [torch.nn.Parameter(parameter.detach().clone()) for _, parameter in named]
    on_cpu, on_device = make(name, plain, variant), make(name, named, variant)
    if adopted:
        on_device.adopt(params, grads)
    rate = torch.tensor(variant["lr"])
    for step in range(4):
        arenas.fill_gradients(plain, seed=step)
        arenas.fill_gradients([parameter for _, parameter in named], seed=step)
        for optimizer in (on_cpu, on_device):
            optimizer.param_groups[0]["lr"] = rate / (step + 1)
        on_cpu.step_scaled(grad_scale=0.5)
        with monkeypatch.context() as patch:
            patch.setattr(device_steps, "step_operator", Launch)
            patch.setattr(plan, "make_device_step", lambda o, device, rows: device_steps.CudaStep(o, rows))
            on_device.step_scaled(grad_scale=torch.tensor(0.5), skip=False)
    for a, (_, b) in zip(plain, named, strict=True):
        assert torch.equal(a, b)
