"""The events of a training, and the check that a callback's methods fit them.

A callback is any object with methods named after events; a method takes, by name, those of the event's
arguments that it wants. Events fire on every rank. Tensors in `result` are lazy: reading one synchronises
with the device, and a callback that calls a collective must call it on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from mlsys_engine.errors import ConfigError, did_you_mean

# Event name -> the arguments that it offers. `control.stop()` ends the training at the next step boundary.
EVENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "on_fit_start": ("step", "run_dir", "plan", "runner", "control"),
        "on_epoch_start": ("step", "epoch", "control"),
        "on_step_start": ("step", "epoch", "batches", "control"),
        "on_step_end": ("step", "epoch", "result", "lr", "runner", "control"),
        "on_evaluation_end": ("step", "epoch", "metrics", "runner", "control"),
        "on_checkpoint_saved": ("step", "path", "control"),
        "on_epoch_end": ("step", "epoch", "control"),
        "on_fit_end": ("step", "status", "metrics", "run_dir", "runner"),
    }
)


class Callbacks:
    """Callbacks that have been checked, ready to be fired."""

    def __init__(self, callbacks: Iterable[Any]) -> None:
        self._handlers: dict[str, list[tuple[Callable[..., Any], tuple[str, ...]]]] = {e: [] for e in EVENTS}
        if isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
            raise ConfigError(
                f"callbacks={callbacks!r}.",
                "It is a list of objects with methods named after events.",
                "Pass callbacks=[...], also for a single one.",
            )
        for callback in callbacks:
            self._register(callback)

    def fire(self, event: str, **arguments: Any) -> None:
        """Calls every callback's method for `event` with the arguments that it asked for."""
        for handler, names in self._handlers[event]:
            handler(**{name: arguments[name] for name in names})

    def _register(self, callback: Any) -> None:
        owner = type(callback).__name__
        if isinstance(callback, type):
            raise ConfigError(
                f"callbacks contains the class {callback.__name__}.",
                "A callback is an object.",
                f"Pass {callback.__name__}(...), an instance.",
            )
        found = [n for n in dir(callback) if n.startswith("on_") and callable(getattr(callback, n))]
        for name in found:
            if name not in EVENTS:
                raise ConfigError(
                    f"The callback {owner} has a method {name}, which is not an event.",
                    f"The events are {', '.join(EVENTS)}.",
                    f"{did_you_mean(name, EVENTS)} Give a method that is not a handler another prefix.",
                )
            handler = getattr(callback, name)
            self._handlers[name].append((handler, _wanted_arguments(owner, name, handler)))
        if not found:
            raise ConfigError(
                f"The callback {owner} has no method of any event.",
                f"The events are {', '.join(EVENTS)}.",
                f"Define one of them on {owner}, or leave it out of callbacks=.",
            )


def _wanted_arguments(owner: str, event: str, handler: Callable[..., Any]) -> tuple[str, ...]:
    offered, wanted = EVENTS[event], []
    for parameter in inspect.signature(handler).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            return offered
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if by_name and parameter.name in offered:
            wanted.append(parameter.name)
        elif parameter.default is parameter.empty:
            stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
            raise ConfigError(
                f"The callback method {owner}.{event} takes an argument '{stars}{parameter.name}'"
                f"{'' if by_name else ' by position'}.",
                f"{event} offers {', '.join(offered)}; a method takes those that it wants, by name.",
                did_you_mean(parameter.name, offered) if by_name else "Name the arguments, without / and *.",
            )
    return tuple(wanted)
