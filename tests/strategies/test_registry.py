from __future__ import annotations

import dataclasses

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.strategies import STRATEGIES, DataParallel, from_name, strategy_type


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_in_the_table_is_a_frozen_value_with_its_name(name):
    cls = strategy_type(name)
    value = from_name(name)
    assert type(value) is cls and value == cls() and value.name == name
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert callable(value.plan) and callable(value.build)
    assert from_name(value) is value


@pytest.mark.parametrize("name", ["data_parallel", "data-parallel", "DataParallel", "DATA_PARALLEL"])
def test_a_name_may_be_written_in_any_of_the_usual_ways(name):
    assert from_name(name) == DataParallel()


@pytest.mark.parametrize("name", ["auto"])
def test_strategies_that_are_not_built_yet_are_refused_as_such(name):
    with pytest.raises(ConfigError, match="This version builds data_parallel"):
        from_name(name)


def test_a_mistyped_name_is_answered_with_what_was_meant():
    with pytest.raises(ConfigError, match="Did you mean 'data_parallel'"):
        from_name("dataparalel")
    with pytest.raises(ConfigError, match="Known names"):
        from_name("xyzzy")


@pytest.mark.parametrize(
    ("value", "message"),
    [(DataParallel, r"Write DataParallel\(\)"), (3, "strategy=3"), (None, "strategy=None")],
)
def test_what_is_no_strategy_is_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        from_name(value)
