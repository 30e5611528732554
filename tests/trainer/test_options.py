"""The arguments of fit are refused before anything is planned or opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.trainer import SaveEvery
from mlsys_engine.trainer.options import FitOptions
from tests.trainer import workloads


def _options(**changes: Any) -> FitOptions:
    arguments: dict[str, Any] = {
        "max_steps": 10, "epochs": None, "has_eval_loader": True, "eval_every": None, "save_every": None,
        "resume": "auto", "record": None,
    }  # fmt: skip
    return FitOptions.checked(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "neither max_steps nor epochs"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": 2.5}, "max_steps=2.5"),
        ({"max_steps": True}, "max_steps=True"),
        ({"epochs": -1}, "epochs=-1"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"eval_every": 5, "has_eval_loader": False}, "eval_every=5 without an eval_loader"),
        ({"save_every": 0}, "save_every=0"),
        ({"resume": True}, "resume=True"),
        ({"resume": 20}, "resume=20"),
        ({"record": {"baseline": {}}}, "Did you mean 'baselines'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _options(**changes)


@pytest.mark.parametrize("resume", [None, False])
def test_resume_can_be_switched_off_in_two_ways(resume: Any) -> None:
    assert _options(resume=resume).resume is None


def test_a_number_means_a_policy_with_the_default_number_kept() -> None:
    assert _options(save_every=5).save_every == SaveEvery(steps=5, keep_last=3)


@pytest.mark.parametrize("keep_last", [0, -1, 1.5])
def test_a_policy_that_would_keep_none_is_refused(keep_last: Any) -> None:
    with pytest.raises(ConfigError, match="keep_last"):
        SaveEvery(steps=1, keep_last=keep_last)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": 3}, "got a int as its model"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"seed": -1}, "seed=-1"),
        ({"verify": "gradients"}, "verify='gradients'"),
        ({"trackers": ("locl",)}, "Did you mean 'local'"),
        ({"strategy": "data_paralel"}, "Did you mean"),
        ({"callbacks": [workloads.Losses]}, "an instance"),
    ],
)
def test_settings_are_refused_when_the_trainer_is_made(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    from mlsys_engine.trainer import Trainer

    arguments: dict[str, Any] = {"model": workloads.make_model(), **settings}
    with pytest.raises(ConfigError, match=message):
        Trainer(arguments.pop("model"), run_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()
