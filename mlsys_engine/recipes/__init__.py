"""Ready trainings: frozen, typed settings that build a model, its data and everything the Trainer takes."""

from mlsys_engine.recipes.base import Recipe, RecipeRun
from mlsys_engine.recipes.registry import (
    DEFAULT_RECIPE,
    RECIPES,
    recipe_class,
    recipe_from_record,
    recorded_settings,
)
from mlsys_engine.recipes.settings import TrainingSettings

__all__ = [
    "DEFAULT_RECIPE",
    "RECIPES",
    "Recipe",
    "RecipeRun",
    "TrainingSettings",
    "recipe_class",
    "recipe_from_record",
    "recorded_settings",
]
