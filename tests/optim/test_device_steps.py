"""The device side of a step without a device: the CPU has the operators that a launch calls on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlsys_engine.optim import device_steps, plan
from mlsys_engine.optim.operands import DeviceLaunch, SentTable
from tests.optim import arenas
from tests.optim.variants import elementwise_variants, make

SHAPES = ((3, 5), (0,), (17,), (5000,))


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize(("name", "variant"), elementwise_variants())
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
            patch.setattr(plan, "make_device_step", device_steps.CudaStep)
            on_device.step_scaled(grad_scale=torch.tensor(0.5), skip=False)
    for a, (_, b) in zip(plain, named, strict=True):
        assert torch.equal(a, b)


def test_a_skipped_launch_changes_neither_parameters_nor_step_counts() -> None:
    named, params, grads = arenas.build(SHAPES)
    optimizer = make("adamw", named, {"lr": 0.1})
    optimizer.adopt(params, grads)
    arenas.fill_gradients([parameter for _, parameter in named], seed=0)
    optimizer.step()
    table, launch = SentTable(params.data.device), DeviceLaunch(optimizer, params.data.device)
    rows = plan.StepPlan(optimizer, [p for _, p in named], [False] * len(named))._parts[0][1]
    assert isinstance(rows, device_steps.CpuStep)
    rows.bind([p.grad for _, p in named if p.grad is not None])
    table.send(rows.segments.table)
    before = params.data.clone()
    for skip in (True, False):
        launch.prepare(optimizer, 1.0, torch.tensor(skip))
        assert launch.num_counted == (0.0 if skip else 1.0)
        launch(table, rows.advance.counts)
        assert torch.equal(before, params.data) == skip
