from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import DTYPES, Bucket, BucketSlot, MeshAxis, Plan
from mlsys_engine.plan.plan import NUMERICS_MODES, PRECISIONS, SHARD_LEVELS, SYNC_MODES

names = st.text(min_size=1, max_size=8)


def _plan(**changes):
    fields = {
        "strategy": "data_parallel",
        "mesh": (MeshAxis(name="data", size=2),),
        "buckets": (Bucket(dtype="float32", slots=(BucketSlot(name="weight", shape=(2, 3)),)),),
        "order_source": "execution",
    }
    return Plan(**(fields | changes))


@st.composite
def plans(draw):
    def pairs(values):
        return tuple(draw(st.dictionaries(names, values, max_size=3)).items())

    sizes = draw(st.dictionaries(names, st.integers(1, 4096), max_size=3))
    slot_names = draw(st.lists(names, unique=True, max_size=6))
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    buckets = tuple(
        Bucket(
            dtype=draw(st.sampled_from(sorted(DTYPES))), slots=(BucketSlot(name=name, shape=draw(shapes)),)
        )
        for name in slot_names
    )
    return Plan(
        strategy=draw(names),
        mesh=tuple(MeshAxis(name=name, size=size) for name, size in sizes.items()),
        buckets=buckets,
        order_source=draw(st.text()),
        tensor_parallel=pairs(st.text()),
        stages=pairs(st.integers(0, 64)),
        schedule=draw(st.none() | st.text()),
        microbatch=draw(st.none() | st.integers(1, 100)),
        shard=draw(st.sampled_from(SHARD_LEVELS)),
        sync=draw(st.sampled_from(SYNC_MODES)),
        compression=draw(st.none() | st.text()),
        algorithms=pairs(st.text()),
        activation=pairs(st.text()),
        precision=draw(st.sampled_from(PRECISIONS)),
        accumulate=draw(st.integers(1, 100)),
        numerics=draw(st.sampled_from(NUMERICS_MODES)),
        compile=draw(st.booleans()),
        seed=draw(st.none() | st.integers()),
    )


@given(plans())
def test_json_gives_back_an_equal_plan_with_an_equal_hash(plan):
    again = Plan.from_json(plan.to_json(indent=2))
    assert again == plan
    assert again.hash == plan.hash
    assert hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()


@given(plans(), plans())
def test_different_plans_have_different_hashes(one, other):
    assert (one.hash == other.hash) == (one == other)


def test_the_hash_is_the_same_in_another_process():
    plan = _plan()
    code = "import sys; from mlsys_engine.plan import Plan; print(Plan.from_json(sys.stdin.read()).hash)"
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=plan.to_json(),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == plan.hash


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_schema_version_is_refused(version):
    data = json.loads(_plan().to_json()) | {"schema_version": version}
    with pytest.raises(ConfigError, match=f"schema version {version}"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"accumulate": "2"},
        {"accumulate": True},
        {"mesh": None},
        {"mesh": [{"name": "data"}]},
        {"stages": [["layer", 1, 2]]},
    ],
)
def test_damaged_json_is_refused_with_the_place(change):
    data = json.loads(_plan().to_json()) | change
    with pytest.raises(ConfigError, match="Plan"):
        Plan.from_json(json.dumps(data))


def test_a_missing_field_and_text_that_is_not_json_are_refused():
    data = json.loads(_plan().to_json())
    del data["buckets"]
    with pytest.raises(ConfigError, match="at Plan"):
        Plan.from_json(json.dumps(data))
    with pytest.raises(ConfigError, match="not JSON"):
        Plan.from_json("{")
    with pytest.raises(ConfigError, match="schema version None"):
        Plan.from_json("[]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": "some"}, "shard"),
        ({"sync": "never"}, "sync"),
        ({"precision": "fp8"}, "precision"),
        ({"numerics": "exact"}, "numerics"),
        ({"accumulate": 0}, "accumulate"),
        ({"microbatch": 0}, "microbatch"),
        ({"schema_version": 3}, "schema_version"),
        ({"mesh": (MeshAxis(name="data", size=1), MeshAxis(name="data", size=2))}, "'data' twice"),
        ({"activation": (("block", "recompute"), ("block", "keep"))}, "'block' twice"),
        (
            {"buckets": (Bucket(dtype="float32", slots=(BucketSlot(name="w", shape=()),)),) * 2},
            "'w' twice",
        ),
    ],
)
def test_a_plan_is_checked_when_it_is_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        _plan(**changes)


def test_axes_and_buckets_are_checked_when_they_are_made():
    with pytest.raises(ConfigError, match="size 0"):
        MeshAxis(name="data", size=0)
    with pytest.raises(ConfigError, match="float31"):
        Bucket(dtype="float31", slots=(BucketSlot(name="w", shape=()),))
    with pytest.raises(ConfigError, match="0 parameters"):
        Bucket(dtype="float32", slots=())


def test_sizes_are_derived():
    plan = _plan(mesh=(MeshAxis(name="data", size=4), MeshAxis(name="model", size=2)))
    assert (plan.world_size, plan.axis("data"), plan.axis("pipeline")) == (8, 4, 1)
    assert plan.gradient_bytes == 24


def test_it_prints_in_a_few_lines_with_buckets_and_bytes():
    slots = [BucketSlot(name=f"layer.{index}.weight", shape=(1024, 1024)) for index in range(200)]
    buckets = tuple(Bucket(dtype="float32", slots=(slot,)) for slot in slots)
    text = str(_plan(buckets=buckets, activation=tuple((f"h.{i}", "recompute") for i in range(48)), seed=3))
    assert len(text.splitlines()) <= 8
    assert all(len(line) < 160 for line in text.splitlines())
    for part in (
        "data 2 = 2 ranks",
        "200 buckets",
        "800.0 MiB",
        "4.0 MiB",
        "and 44 more",
        "execution",
        "seed 3",
    ):
        assert part in text
