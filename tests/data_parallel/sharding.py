"""What the tests of sharded optimizer state share: a model of awkward sizes, and ways to train it."""

from __future__ import annotations

import contextlib
import functools
import math
from unittest import mock

import numpy as np
import torch
from torch import nn

from mlsys_engine import optim, strategies
from mlsys_engine.data_parallel import build
from mlsys_engine.data_parallel.sharded_device import DeviceShardReduction, DeviceShardUpdate
from tests.data_parallel.models import pairs, squared_error

ADAMW = functools.partial(optim.AdamW, lr=0.05, weight_decay=0.1)
MOMENTUM = functools.partial(optim.SGD, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01)
STEPS = 20


class Uneven(nn.Module):
    """Sizes that divide by nothing: a tensor of many chunks, some below one, a scalar, an empty one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 1237), nn.Linear(1237, 11)
        self.last = nn.Linear(11, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.scale + self.nothing.sum()


def groups(kind, named):
    """Three groups: no decay for biases, and the last layer left out altogether."""
    kept = [(name, parameter) for name, parameter in named if not name.startswith("last.")]
    return kind([
        {"params": [pair for pair in kept if not pair[0].endswith("bias")], "weight_decay": 0.2},
        {"params": [pair for pair in kept if pair[0].endswith("bias")], "weight_decay": 0.0, "lr": 0.01},
    ])  # fmt: skip


def wrap(model, shard, optimizer=ADAMW, bucket_mib=0.01, **options):
    """`shard` as DataParallel has it, or "device": sharded, CPU tensors on the path of a device's."""
    strategy = strategies.DataParallel(
        shard="optimizer" if shard == "device" else shard, bucket_mib=bucket_mib
    )
    with device_path() if shard == "device" else contextlib.nullcontext():
        return strategies.wrap(model, optimizer=optimizer, loss=squared_error, strategy=strategy, **options)


def device_path():
    """While it lasts, runners on the CPU are built as on a device."""
    kinds = DeviceShardReduction, DeviceShardUpdate
    return mock.patch.object(build, "_sharding_on", lambda _device: kinds)


def weights_of(model):
    return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def train(rank, world_size, shard, optimizer, max_grad_norm):
    """20 steps with two microbatches, of which rank 0 lacks one; a schedule; a step that is skipped."""
    model = Uneven()
    runner = wrap(model, shard, optimizer, sample=pairs(1), max_grad_norm=max_grad_norm)
    schedule = torch.optim.lr_scheduler.LambdaLR(runner.optimizer, lambda step: 1.0 / (1 + step))
    results = []
    for step in range(STEPS):
        batches = [pairs(rank + 1, seed=10 * step + part) for part in range(1 if rank == 0 else 2)]
        if step == 7 and rank == world_size - 1:
            batches[0][0].fill_(math.inf)
        result = runner.step(batches)
        schedule.step()
        results.append((result.loss.item(), result.grad_norm.item(), bool(result.skipped)))
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    return results, weights_of(model), grads


def resume(rank, world_size, shard, state, steps):
    model = Uneven()
    runner = wrap(model, shard, MOMENTUM if state is not None and "sgd" in state else ADAMW, sample=pairs(1))
    if state is not None and "model" in state:
        runner.load_state_dict({
            "model": {name: torch.from_numpy(value) for name, value in state["model"].items()},
            "optimizer": {
                "state": {
                    name: {key: torch.from_numpy(value) for key, value in values.items()}
                    for name, values in state["optimizer"]["state"].items()
                },
                "param_groups": state["optimizer"]["param_groups"],
            },
        })  # fmt: skip
    for step in range(steps):
        runner.step([pairs(2, seed=1000 * steps + 10 * step)] if rank == 0 else [])
    full = runner.state_dict(full=True)
    return {
        "model": {name: value.numpy() for name, value in full["model"].items()},
        "optimizer": {
            "state": {
                name: {key: value.numpy() for key, value in values.items()}
                for name, values in full["optimizer"]["state"].items()
            },
            "param_groups": full["optimizer"]["param_groups"],
        },
    }


def assert_same_state(left, right):
    assert left["model"].keys() == right["model"].keys()
    assert all(np.array_equal(value, right["model"][name]) for name, value in left["model"].items())
    assert left["optimizer"]["state"].keys() == right["optimizer"]["state"].keys()
    for name, values in left["optimizer"]["state"].items():
        other = right["optimizer"]["state"][name]
        assert values.keys() == other.keys()
        assert all(np.array_equal(value, other[key]) for key, value in values.items()), name
