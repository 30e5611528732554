from __future__ import annotations

import pytest
import torch
from torch import nn

from mlsys_engine.data_parallel.arenas import ModelArenas
from mlsys_engine.errors import ConfigError
from tests.data_parallel.models import mlp, plan_of


def _arenas(model, bucket_mib=0.0002):
    return ModelArenas(plan_of(model, bucket_mib=bucket_mib).buckets, dict(model.named_parameters()))


def test_parameters_become_views_with_the_same_values_and_the_same_objects():
    model = mlp()
    objects = dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in objects.items()}
    arenas = _arenas(model)
    flat = arenas.pairs["float32"].parameters
    assert len(arenas.buckets) > 2
    for name, parameter in model.named_parameters():
        assert parameter is objects[name]
        assert torch.equal(parameter, values[name])
    for slot in flat.slots:
        assert model.get_parameter(slot.name).data_ptr() == flat.view(slot).data_ptr()


def test_buckets_tile_the_arena_and_start_on_64_bytes():
    arenas = _arenas(mlp(width=7))
    pair = arenas.pairs["float32"]
    assert sum(bucket.gradients.numel() for bucket in arenas.buckets) == pair.gradients.data.numel()
    for bucket in arenas.buckets:
        offset = bucket.gradients.storage_offset()
        assert offset * 4 % 64 == 0 and bucket.parameters.storage_offset() == offset
    assert [place.index for place in arenas.places] == list(range(len(arenas.places)))
    assert [slot.name for slot in pair.parameters.slots] == [place.name for place in arenas.places]


def test_each_dtype_has_its_own_pair():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    arenas = _arenas(model, bucket_mib=25)
    assert {name: pair.gradients.data.dtype for name, pair in arenas.pairs.items()} == {
        "float64": torch.float64,
        "float32": torch.float32,
    }
    assert [place.name for place in arenas.places][:2] == ["1.bias", "1.weight"]


def test_gradients_come_from_the_given_allocator():
    model, asked = mlp(), []

    def allocate(numel, dtype):
        asked.append((numel, dtype))
        return torch.zeros(numel, dtype=dtype)

    arenas = ModelArenas(plan_of(model).buckets, dict(model.named_parameters()), allocate)
    assert asked == [(arenas.pairs["float32"].gradients.data.numel(), torch.float32)]


def test_a_parameter_that_was_given_other_memory_is_found():
    model = mlp()
    arenas = _arenas(model)
    arenas.check_in_place()
    model[2].bias.data = model[2].bias.data.clone()
    with pytest.raises(ConfigError, match=r"2\.bias was given other memory"):
        arenas.check_in_place()


def test_release_gives_each_parameter_memory_of_its_own():
    model = mlp()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arenas = _arenas(model)
    arenas.release()
    arenas.pairs["float32"].parameters.data.fill_(7)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_parameters_without_elements_have_a_place():
    model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 3))
    arenas = _arenas(model, bucket_mib=25)
    assert {place.name: tuple(place.data.shape) for place in arenas.places}["0.weight"] == (0, 3)
    arenas.check_in_place()
