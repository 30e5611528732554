from __future__ import annotations

import itertools
import random

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.pipeline import split

UNITS = ("embed", "drop", "h.0", "h.1", "h.2", "h.3", "norm", "head")
BLOCKS = {"h.0", "h.1", "h.2", "h.3"}


def _loads(stages, costs):
    return [
        sum(cost for unit, cost in costs.items() if stages[unit] == k)
        for k in range(max(stages.values()) + 1)
    ]


def test_units_outside_the_blocks_go_with_the_block_before_them():
    found = split.balanced(UNITS, BLOCKS, dict.fromkeys(BLOCKS, 1.0), 2)
    assert found == {"embed": 0, "drop": 0, "h.0": 0, "h.1": 0, "h.2": 1, "h.3": 1, "norm": 1, "head": 1}


def test_a_heavy_head_gets_fewer_blocks():
    costs = dict.fromkeys(BLOCKS, 1.0) | {"head": 2.0}
    assert _loads(split.balanced(UNITS, BLOCKS, costs, 2), costs) == [3, 3]


def test_no_contiguous_cut_has_a_faster_slowest_stage():
    numbers = random.Random(0)
    for _ in range(50):
        count = numbers.randint(1, 8)
        stages = numbers.randint(1, count)
        names = [f"h.{index}" for index in range(count)]
        costs = {name: float(numbers.randint(0, 9)) for name in names}
        found = split.balanced(names, names, costs, stages)
        least = min(
            max(sum(costs[name] for name in names[a:b]) for a, b in itertools.pairwise((0, *cuts, count)))
            for cuts in itertools.combinations(range(1, count), stages - 1)
        )
        assert sorted(set(found.values())) == list(range(stages))
        assert max(_loads(found, costs)) == least


def test_more_stages_than_blocks_are_refused_with_the_number_that_works():
    with pytest.raises(ConfigError, match="Set stages to 4 or less"):
        split.balanced(UNITS, BLOCKS, {}, 5)


def test_named_units_begin_the_stages_after_the_first():
    found = split.given(UNITS, ("h.1", "head"))
    assert [found[unit] for unit in UNITS] == [0, 0, 0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("starts", "message"),
    [(("h.9",), "A stage begins at a block"), (("h.2", "h.1"), "sort the others"), (("embed",), "Leave out")],
)
def test_names_that_begin_no_stage_are_refused(starts, message):
    with pytest.raises(ConfigError, match=message):
        split.given(UNITS, starts)
