from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from typing import Any

import pytest

from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.recipes import RECIPES, TrainingSettings, recipe_class


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("accumulate", 0),
        ("eval_every", 0),
        ("eval_samples", 0),
        ("save_every", 0),
        ("warmup_steps", -1),
        ("seed", -1),
        ("weight_decay", -0.1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("beta2", 1.0),
        ("final_lr_fraction", 1.5),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("nan")),
    ],
)
def test_a_setting_out_of_its_range_is_refused_by_its_option(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} "):
        TrainingSettings(**{name: value})


@pytest.mark.parametrize("kind", [TrainingSettings, *(recipe_class(name) for name in RECIPES)])
def test_every_setting_is_documented_in_one_sentence(kind: type[Any]) -> None:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    for field, after in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(field)
            assert str(after.value.value).endswith(".")


def test_a_batch_smaller_than_the_ranks_is_refused() -> None:
    settings = TrainingSettings(batch_size=3)
    settings.check(3)
    with pytest.raises(DataError, match=r"--batch-size 3 with 4 ranks\. .* Set --batch-size to 4 or more"):
        settings.check(4)


def test_unknown_strategies_policies_and_trackers_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'data_parallel'"):
        TrainingSettings(strategy="data_paralel").check(1)
    with pytest.raises(ConfigError, match="Did you mean 'full'"):
        TrainingSettings(activation="ful").check(1)
    with pytest.raises(ConfigError, match="Did you mean 'local'"):
        TrainingSettings(trackers=("loca",)).check(1)


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine() -> None:
    factor = TrainingSettings(warmup_steps=4, steps=14, final_lr_fraction=0.1).lr_schedule()
    rates = [factor(step) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.55)  # halfway down: (1 + 0.1) / 2
    assert rates[14:] == pytest.approx([0.1] * 6)
    assert rates[4:15] == sorted(rates[4:15], reverse=True)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (5, 3), (3, 3)])
def test_a_schedule_longer_than_the_training_stays_between_zero_and_one(warmup: int, steps: int) -> None:
    factor = TrainingSettings(warmup_steps=warmup, steps=steps, final_lr_fraction=0.0).lr_schedule()
    assert all(0.0 <= factor(step) <= 1.0 for step in range(10))
    assert factor(0) > 0.0
