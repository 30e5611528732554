from __future__ import annotations

from dataclasses import dataclass

from tests.support import soak


@dataclass(frozen=True)
class _Item:
    nodeid: str
    marked: bool = True

    def get_closest_marker(self, name: str) -> bool:
        return self.marked and name == "soak"


_ITEMS = [
    _Item("a.py::plain", marked=False),
    *(_Item(f"a.py::{t}[{n}]") for t in ("one", "two") for n in range(20)),
]


def _drawn(**variables: str) -> list[str]:
    kept, left_out = soak.draw(_ITEMS, variables)
    assert sorted(item.nodeid for item in kept + left_out) == sorted(item.nodeid for item in _ITEMS)
    return [item.nodeid for item in kept]


def test_without_a_sample_every_trial_runs_and_the_header_says_nothing() -> None:
    assert len(_drawn()) == len(_drawn(MLSYS_SOAK_SAMPLE="")) == 41
    assert soak.header({}) is None


def test_a_sample_is_drawn_of_each_soak_test_and_of_no_other() -> None:
    kept = _drawn(MLSYS_SOAK_SAMPLE="2")
    assert kept[0] == "a.py::plain"
    assert [name.split("[")[0] for name in kept[1:]] == ["a.py::one"] * 2 + ["a.py::two"] * 2


def test_the_seed_that_the_header_names_draws_the_same_trials_again() -> None:
    draws = {seed: _drawn(MLSYS_SOAK_SAMPLE="2", MLSYS_SOAK_SEED=str(seed)) for seed in range(5)}
    assert len({tuple(draw) for draw in draws.values()}) > 1
    variables = {"MLSYS_SOAK_SAMPLE": "2", "MLSYS_SOAK_SEED": "3"}
    assert "MLSYS_SOAK_SEED=3" in (soak.header(variables) or "")
    assert _drawn(**variables) == draws[3]


def test_a_sample_larger_than_the_test_is_the_whole_test() -> None:
    assert len(_drawn(MLSYS_SOAK_SAMPLE="99")) == 41
