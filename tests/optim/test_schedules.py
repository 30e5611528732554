"""Learning-rate schedules: their curves, their form as values, what they refuse, and the scaled rate."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from mlsys_engine.errors import ConfigError
from mlsys_engine.optim import schedules
from mlsys_engine.optim.schedules import SCHEDULES, scaled_lr
from mlsys_engine.trainer.schedule import Schedule

WARMUP, TOTAL = 4, 24
EXAMPLES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"total_steps": TOTAL, "final": 0.1},
    "cosine": {"total_steps": TOTAL, "final": 0.1},
    "polynomial": {"total_steps": TOTAL, "power": 2.0, "final": 0.1},
    "wsd": {"total_steps": TOTAL, "decay_steps": 10, "final": 0.1},
    "inverse_sqrt": {},
}


def _example(name: str, **fields: Any) -> schedules.WarmedUp:
    return SCHEDULES[name](**{"warmup_steps": WARMUP, **EXAMPLES[name], **fields})


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_in_a_line_to_the_full_rate_and_never_rises_again(name: str) -> None:
    factors = [_example(name)(step) for step in range(2 * TOTAL)]
    assert factors[:WARMUP] == [0.2, 0.4, 0.6, 0.8]
    assert factors[WARMUP] == 1.0
    assert factors[WARMUP:] == sorted(factors[WARMUP:], reverse=True)
    assert _example(name, warmup_steps=0)(0) == 1.0


# Halfway through the decay, from the definition of each curve.
HALFWAY = {
    "linear": (14, 0.55),
    "cosine": (14, 0.55),
    "polynomial": (14, 0.1 + 0.9 * 0.25),
    "wsd": (19, 0.55),
    "inverse_sqrt": (2 * WARMUP, math.sqrt(0.5)),
}


@pytest.mark.parametrize("name", HALFWAY)
def test_the_curves_are_those_of_their_definitions(name: str) -> None:
    step, expected = HALFWAY[name]
    assert _example(name)(step) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - {"constant", "inverse_sqrt"}))
def test_a_schedule_with_an_end_stays_at_its_last_factor(name: str) -> None:
    schedule = _example(name)
    assert schedule(TOTAL - 1) > 0.1
    assert [schedule(step) for step in (TOTAL, TOTAL + 1, 100 * TOTAL)] == pytest.approx([0.1] * 3, rel=1e-15)


def test_warmup_stable_decay_is_flat_in_its_middle() -> None:
    assert {_example("wsd")(step) for step in range(WARMUP, TOTAL - 10 + 1)} == {1.0}
    assert _example("wsd")(TOTAL - 9) < 1.0


@pytest.mark.parametrize(("decay", "expected"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_the_decay_of_warmup_stable_decay_has_the_chosen_shape(decay: str, expected: float) -> None:
    assert _example("wsd", decay=decay, final=0.0)(19) == pytest.approx(expected, rel=1e-15)


def test_the_inverse_square_root_is_that_of_the_transformer_paper() -> None:
    schedule = _example("inverse_sqrt")
    for step in range(WARMUP, 100):
        assert schedule(step) == pytest.approx(step**-0.5 / WARMUP**-0.5, rel=1e-15)
    assert _example("inverse_sqrt", timescale=7)(WARMUP + 7) == pytest.approx(0.5**0.5, rel=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_value_that_copies_pickles_compares_and_hashes(name: str) -> None:
    schedule = _example(name)
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule == copy.deepcopy(schedule)
    assert hash(again) == hash(schedule)
    assert schedule != _example(name, warmup_steps=WARMUP + 1)
    assert f"warmup_steps={WARMUP}" in str(schedule)
    with pytest.raises(AttributeError):
        schedule.warmup_steps = 9


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.3)


def _rates(schedule: Schedule, num_steps: int) -> list[float]:
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.lr)
        schedule.after_step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_trainer_and_torch_take_a_schedule_as_it_is(name: str) -> None:
    optimizer = _optimizer()
    scheduler = lr_scheduler.LambdaLR(optimizer, _example(name))
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = _rates(Schedule(_example(name), _optimizer()), 6)
    assert rates == expected == [0.3 * _example(name)(step) for step in range(6)]


def test_a_resumed_training_follows_the_schedule_that_it_is_given_now() -> None:
    short, long = schedules.Linear(total_steps=4), schedules.Linear(total_steps=8)
    before = Schedule(short, _optimizer())
    assert _rates(before, 2) == [0.3 * short(0), 0.3 * short(1)]
    optimizer = _optimizer()
    after = Schedule(long, optimizer)
    after.load_state_dict(before.state_dict())
    # The first step after a resume has the rate that the optimizer was saved with.
    assert _rates(after, 4)[1:] == [0.3 * long(3), 0.3 * long(4), 0.3 * long(5)]
    assert short == schedules.Linear(total_steps=4)  # loading a state leaves the values alone
    assert long == schedules.Linear(total_steps=8)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("constant", {"warmup_steps": -1}, r"warmup_steps=-1\).*at least 0"),
        ("constant", {"warmup_steps": 2.5}, r"warmup_steps=2\.5"),
        ("constant", {"warmup_steps": True}, "warmup_steps=True"),
        ("linear", {"total_steps": 0}, r"total_steps=0\).*at least 1"),
        ("linear", {"total_steps": 3}, "Set total_steps to 4 or more"),
        ("cosine", {"final": 1.5}, r"final=1\.5.*from 0 to 1"),
        ("cosine", {"final": float("nan")}, "final=nan"),
        ("polynomial", {"power": 0.0}, r"power=0\.0"),
        ("wsd", {"decay_steps": 0}, "decay_steps=0"),
        ("wsd", {"decay_steps": 21}, "Set total_steps to 25 or more"),
        ("wsd", {"decay": "cosin"}, "Did you mean 'cosine'"),
        ("inverse_sqrt", {"timescale": 0}, "timescale=0"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _example(name, **fields)


def test_the_learning_rate_scales_with_the_batch_by_the_rule() -> None:
    assert scaled_lr(0.1, batch_size=8192, base_batch_size=256) == pytest.approx(3.2)
    assert scaled_lr(1e-3, batch_size=1024, base_batch_size=256, rule="sqrt") == pytest.approx(2e-3)
    assert scaled_lr(1e-3, batch_size=64, base_batch_size=256, rule="sqrt") == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "lineal"}, "Did you mean 'linear'"),
        ({"batch_size": 0}, "batch_size is a positive number"),
        ({"base_batch_size": -1}, "base_batch_size is a positive number"),
        ({"base_lr": float("nan")}, "base_lr is a positive number"),
    ],
)
def test_a_rate_that_cannot_be_scaled_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaled_lr(**{"base_lr": 0.1, "batch_size": 8, "base_batch_size": 4, **change})
