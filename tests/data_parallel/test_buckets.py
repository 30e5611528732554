from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mlsys_engine.data_parallel.buckets import MIB, layout_buckets
from mlsys_engine.trace import ModuleInfo, ParameterInfo, Trace, trace


def _names(buckets):
    return [[slot.name for slot in bucket.slots] for bucket in buckets]


def test_buckets_hold_parameters_in_the_reverse_order_of_use():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    assert _names(layout_buckets(trace(model, torch.zeros(1, 2)), 25)) == [
        ["1.bias", "1.weight", "0.bias", "0.weight"]
    ]


def test_the_first_bucket_is_small_and_a_parameter_over_the_limit_is_alone():
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(12)])  # 0.25 MiB each
    model[3] = nn.Linear(256, 2048, bias=False)  # 2 MiB
    buckets = layout_buckets(trace(model), bucket_mib=1.5, first_bucket_mib=0.5)
    assert [bucket.num_bytes / MIB for bucket in buckets] == [0.5, 1.5, 2.0, 0.75]


def test_each_bucket_has_one_dtype_and_buckets_follow_their_last_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2))
    assert _names(layout_buckets(trace(model), 25)) == [
        ["1.bias", "1.weight"],
        ["2.bias", "2.weight", "0.bias", "0.weight"],
    ]


def test_frozen_parameters_are_left_out_and_tied_ones_appear_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[1].requires_grad_(False)
    assert _names(layout_buckets(trace(model), 25)) == [["2.bias", "0.bias", "0.weight"]]
    assert layout_buckets(trace(model.requires_grad_(False)), 25) == ()


@given(st.lists(st.integers(0, 3 * MIB // 4), max_size=40), st.floats(0.01, 4), st.floats(0.01, 4))
def test_every_parameter_is_in_one_bucket_within_its_limit(numels, bucket_mib, first_mib):
    parameters = tuple(
        ParameterInfo(fqn=str(index), shape=(numel,), dtype=torch.float32, requires_grad=True)
        for index, numel in enumerate(numels)
    )
    names = tuple(parameter.fqn for parameter in parameters)
    root = ModuleInfo(fqn="", class_name="Model", is_leaf=True, parameters=names)
    found = Trace(parameters=parameters, buffers=(), modules=(root,), order_source="none")
    buckets = layout_buckets(found, bucket_mib, first_mib)
    assert [slot.name for bucket in buckets for slot in bucket.slots] == [
        parameter.fqn for parameter in reversed(parameters)
    ]
    for index, bucket in enumerate(buckets):
        limit = min(first_mib, bucket_mib) if index == 0 else bucket_mib
        assert len(bucket.slots) == 1 or bucket.num_bytes <= limit * MIB
