from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mlsys_engine.errors import ConfigError
from mlsys_engine.strategies import DataParallel, PlanOptions
from mlsys_engine.strategies.base import Subject


def _plan(strategy=None, **options):
    return (strategy or DataParallel()).plan(Subject(nn.Linear(4, 2)), 3, PlanOptions(**options))


def test_it_is_a_frozen_value_that_prints_as_it_is_written():
    strategy = DataParallel(bucket_mib=5)
    assert strategy == DataParallel(bucket_mib=5) and hash(strategy) == hash(DataParallel(bucket_mib=5))
    assert repr(strategy).startswith(
        "DataParallel(shard='none', sync='step', compression=None, bucket_mib=5,"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.shard = "optimizer"


def test_a_plan_holds_the_mesh_the_buckets_and_every_option():
    plan = _plan(accumulate=2, activation={"": "recompute"}, numerics="reproducible", compile=True, seed=4)
    assert (plan.strategy, plan.axis("data"), plan.world_size) == ("data_parallel", 3, 3)
    assert [slot.name for slot in plan.buckets[0].slots] == ["bias", "weight"]
    assert (plan.accumulate, plan.activation, plan.compile, plan.seed) == (2, (("", "recompute"),), True, 4)
    assert (plan.shard, plan.sync, plan.compression, plan.precision) == ("none", "step", None, "fp32")
    assert plan.numerics == "reproducible"
    assert "gradients" in dict(plan.algorithms)


def test_the_size_of_buckets_is_part_of_the_plan():
    assert len(_plan(DataParallel(bucket_mib=1e-6)).buckets) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shard": "gradients"}, "This version builds shard='none' or 'optimizer' only"),
        ({"shard": "parameters"}, "Leave shard out"),
        ({"sync": "async"}, "This version builds sync='step' only"),
        ({"shard": "optimiser"}, "Did you mean 'optimizer'"),
        ({"compression": "zip"}, "compression is one of"),
        ({"bucket_mib": 0}, "positive size"),
        ({"bucket_mib": float("nan")}, "positive size"),
        ({"bucket_mib": True}, "positive size"),
    ],
)
def test_settings_that_are_not_built_or_not_known_are_refused_when_it_is_made(setting, message):
    with pytest.raises(ConfigError, match=message):
        DataParallel(**setting)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"numerics": "world_invariant", "seed": 0}, "onto 1, 2, 4, 8 ranks"),
        ({"numerics": "slow"}, "numerics='slow'"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": 1.5}, "accumulate=1.5"),
        ({"accumulate": True}, "accumulate=True"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        _plan(**options)


def test_a_plan_is_the_same_for_the_same_model_and_shape():
    model, sample = nn.Linear(4, 2), torch.zeros(1, 4)
    one, other = (DataParallel().plan(Subject(model, sample), 2, PlanOptions()) for _ in range(2))
    assert one.hash == other.hash
