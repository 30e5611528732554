"""Ordinary models whose weights are cut over ranks: the loss and every gradient are one process's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.numerics import call_model
from mlsys_engine.tensor_parallel import report, shardings
from mlsys_engine.tensor_parallel.runtime import TensorParallel, gather
from tests.strategies import zoo


def _loss(model, batch):
    output = call_model(model, batch, with_loss=False)
    return output["loss"]


def cut(model, sample, size, plan="auto", **options):
    """The model with its parameters cut in place, and what it runs under."""
    found = shardings(model, report(model, sample, size, plan).styles, size)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameters[name].shape) for name in found}
    for name, sharding in found.items():
        own = parameters[name]
        part = nn.Parameter(sharding.take(own.detach(), dist.get_rank()).clone(), own.requires_grad)
        torch.utils.swap_tensors(own, part)
    return found, TensorParallel(model, found, shapes, dist.group.WORLD, **options)


def _first_step(rank, world_size, name, sequence_parallel=False, shape=(4, 8)):
    make, batches = zoo.MODELS[name]
    torch.manual_seed(0)
    model, batch = make().double(), batches(*shape)
    batch = torch.utils._pytree.tree_map(
        lambda leaf: leaf.double() if torch.is_tensor(leaf) and leaf.is_floating_point() else leaf, batch
    )
    torch.manual_seed(1)
    with zoo.InFloat64():
        expected = _loss(model, batch)
    expected.backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()
                 if parameter.grad is not None}  # fmt: skip
    model.zero_grad(set_to_none=True)
    found, context = cut(model, batch, world_size, sequence_parallel=sequence_parallel)
    torch.manual_seed(1)
    with zoo.InFloat64(), context.active():
        loss = context.whole(_loss(model, batch))
        loss.backward()
    worst = {}
    for key, parameter in model.named_parameters():
        if key not in gradients:
            continue
        own = parameter.grad if key not in found else gather(parameter.grad, found[key], dist.group.WORLD)
        worst[key] = float((own - gradients[key]).abs().max() / gradients[key].abs().max().clamp_min(1e-2))
    key = max(worst, key=worst.__getitem__)
    return float(loss.detach() / expected.detach()) - 1, key, worst[key], len(found)


@pytest.mark.parametrize("shape", [(4, 8), (3, 7)])
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_values_cut_along_their_tokens_give_the_same_first_step(run_ranks, name, shape):
    for loss, culprit, difference, _ in run_ranks(_first_step, 2, name, True, shape):
        assert abs(loss) < 1e-10
        assert difference < 1e-10, culprit


@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_the_first_step_in_float64_is_one_process_s(run_ranks, name):
    for loss, culprit, difference, _ in run_ranks(_first_step, 2, name):
        assert abs(loss) < 1e-10
        assert difference < 1e-10, culprit
