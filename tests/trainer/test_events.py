"""Callbacks are checked against the events when they are registered, not when they fire."""

from __future__ import annotations

from typing import Any

import pytest

from mlsys_engine.errors import ConfigError
from mlsys_engine.trainer.events import EVENTS, Callbacks


class TakesSome:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, lr: float, *, step: int) -> None:
        self.seen.append((step, lr))


class TakesAll:
    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_fit_end(self, **arguments: Any) -> None:
        self.seen = arguments


class WithDefault:
    def __init__(self) -> None:
        self.factor = 0

    def on_step_end(self, step: int, factor: int = 3) -> None:
        self.factor = factor


class MistypedEvent:
    def on_step_ended(self, step: int) -> None: ...


class MistypedArgument:
    def on_step_end(self, stepp: int) -> None: ...


class PositionalOnly:
    def on_step_end(self, step: int, /) -> None: ...


class VariablePositional:
    def on_step_end(self, *arguments: Any) -> None: ...


class NoEvent:
    def step_end(self) -> None: ...


def test_a_method_gets_the_arguments_that_it_names() -> None:
    callback = TakesSome()
    Callbacks([callback]).fire("on_step_end", step=3, lr=0.5, epoch=0, result=None, runner=None, control=None)
    assert callback.seen == [(3, 0.5)]


def test_a_method_with_keywords_gets_exactly_what_the_event_offers() -> None:
    callback = TakesAll()
    arguments = dict.fromkeys([*EVENTS["on_fit_end"], "another"], 1)
    Callbacks([callback]).fire("on_fit_end", **arguments)
    assert tuple(callback.seen) == EVENTS["on_fit_end"]


def test_an_argument_of_its_own_with_a_default_keeps_it() -> None:
    callback = WithDefault()
    Callbacks([callback]).fire("on_step_end", step=1)
    assert callback.factor == 3


def test_callbacks_fire_in_their_order() -> None:
    first, second = TakesSome(), TakesSome()
    second.seen = first.seen
    Callbacks([first, second]).fire("on_step_end", step=1, lr=0.0)
    assert len(first.seen) == 2


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (MistypedEvent(), r"MistypedEvent has a method on_step_ended.*Did you mean 'on_step_end'"),
        (MistypedArgument(), r"MistypedArgument\.on_step_end takes an argument 'stepp'.*Did you mean 'step'"),
        (PositionalOnly(), r"'step' by position.*offers step, epoch, result, lr, runner, control"),
        (VariablePositional(), r"takes an argument '\*arguments' by position"),
        (NoEvent(), r"NoEvent has no method of any event.*on_fit_start"),
        (TakesSome, r"contains the class TakesSome.*an instance"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(callback: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Callbacks([callback])


@pytest.mark.parametrize("callbacks", [TakesSome(), "on_fit_end", 3])
def test_callbacks_that_are_no_list_are_refused(callbacks: Any) -> None:
    with pytest.raises(ConfigError, match=r"Pass callbacks=\[\.\.\.\]"):
        Callbacks(callbacks)
