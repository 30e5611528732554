"""Rules that need whole tensors: what they leave out, batches of tensors, and where they are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlsys_engine.data_parallel.sharded import check_shardable
from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import LAMB, LARS
from tests.optim.variants import EPSILON, gradients_for, make

BATCH = 512 * 1024  # csrc/optim/tensor_step.h: kBatchElements


@pytest.mark.parametrize("cls", [LAMB, LARS])
def test_vectors_are_left_out_of_scaling_and_decay_unless_their_group_says_otherwise(
    cls: type[LAMB | LARS],
) -> None:
    layer = nn.Linear(3, 3)
    optimizer = cls(layer.named_parameters())
    assert [(group["exclude"], group["param_names"]) for group in optimizer.param_groups] == [
        (False, ["weight"]),
        (True, ["bias"]),
    ]
    told = cls([{"params": list(layer.parameters()), "exclude": False}])
    assert [group["exclude"] for group in told.param_groups] == [False]


def test_lamb_moves_a_tensor_by_its_own_norm_times_the_rate_whatever_the_gradients_size() -> None:
    for size in (1e-3, 1.0, 1e3):
        parameter = nn.Parameter(torch.linspace(0.5, 1.5, 12).view(3, 4))
        before = parameter.detach().clone()
        parameter.grad = gradients_for((3, 4), 1, seed=0)[0] * size
        LAMB([parameter], lr=0.01, weight_decay=0.0).step()
        moved = (parameter - before).norm() / before.norm()
        assert moved.item() == pytest.approx(0.01, rel=200 * EPSILON / 0.01)  # of p's own roundings


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_tensors_in_one_batch_or_in_many_step_with_the_same_bits(name: str) -> None:
    shapes = (3, 5), (BATCH // 1000, 1000), (7, 1), (2, BATCH), (1, 1), (300, 40)
    generator = torch.Generator().manual_seed(0)
    together = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    alone = [nn.Parameter(parameter.detach().clone()) for parameter in together]
    optimizers = [make(name, together, {"lr": 0.01}), *(make(name, [one], {"lr": 0.01}) for one in alone)]
    for step in range(2):
        for number, pair in enumerate(zip(together, alone, strict=True)):
            for parameter in pair:
                (parameter.grad,) = gradients_for(tuple(parameter.shape), 1, seed=10 * step + number)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_a_tensor_of_zeros_takes_the_rate_as_it_is(name: str) -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    make(name, [parameter], {"lr": 0.5}).step()
    assert torch.allclose(parameter, torch.full((2, 2), -0.5), rtol=1e-5)  # LAMB divides by 1 + eps


@pytest.mark.parametrize("name", ["adafactor", "lamb", "lars", "muon"])
def test_shards_of_tensors_are_refused(name: str) -> None:
    optimizer = make(name, [nn.Parameter(torch.ones(2, 2))], {})
    with pytest.raises(ConfigError, match=r'shard="optimizer".*shard="none"'):
        check_shardable(optimizer)
