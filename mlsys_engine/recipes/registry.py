"""The recipes by name, and the way from a run's record back to its recipe."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.recipes.base import Recipe

RECIPES = {
    "gpt-bytes": "mlsys_engine.recipes.gpt_bytes:GPTBytes",
    "gpt-file": "mlsys_engine.recipes.gpt_file:GPTFile",
}
DEFAULT_RECIPE = "gpt-bytes"


def recipe_class(name: str) -> type[Any]:
    """The dataclass of a recipe. Raises ConfigError for a name that is not in the table."""
    if name not in RECIPES:
        raise ConfigError(
            f"There is no recipe named {name!r}.",
            f"Recipes are {', '.join(RECIPES)}.",
            did_you_mean(name, RECIPES),
        )
    module, _, attribute = RECIPES[name].partition(":")
    loaded: type[Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def recorded_settings(name: str, recipe: Recipe) -> dict[str, Any]:
    """What the record keeps under `manifest.config`, so that the run can be started again from it."""
    settings = dataclasses.asdict(recipe)  # type: ignore[call-overload]  # recipes are dataclasses
    return {"recipe": name, "settings": settings}


def recipe_from_record(manifest: Mapping[str, Any]) -> tuple[str, Recipe]:
    """The name and the settings of a recorded run. Raises ConfigError when it has none."""
    config = manifest.get("config") or {}
    name, settings = config.get("recipe"), config.get("settings")
    if not isinstance(name, str) or not isinstance(settings, Mapping):
        raise ConfigError(
            "The run's record names no recipe.",
            "Only a run that `mlsys train` started can be resumed by it.",
            "Resume it with the script that started it.",
        )
    recipe: Recipe = _restore(recipe_class(name), settings, where=name)
    return name, recipe


def _restore(kind: Any, value: Any, where: str) -> Any:
    """`value` as JSON gave it, as the type `kind` of a settings field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _restore(arguments[0], value, where)
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _restore(inner, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        kinds = typing.get_type_hints(kind, include_extras=True)
        if unknown := sorted(set(value) - {field.name for field in dataclasses.fields(kind)}):
            raise ConfigError(
                f"The record's settings of {where} have the field {unknown[0]!r}.",
                "This version of the recipe does not have it.",
                f"Check out the code that the run was started with. {did_you_mean(unknown[0], kinds)}",
            )
        return kind(**{key: _restore(kinds[key], item, f"{where}.{key}") for key, item in value.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    if kind is float and isinstance(value, int):
        return float(value)
    return Path(value) if kind is Path else value
