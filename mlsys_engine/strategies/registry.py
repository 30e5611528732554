"""The table of strategies, and how a name becomes a value."""

from __future__ import annotations

import importlib
import re
from typing import Any

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.strategies.base import Strategy

STRATEGIES = {
    "data_parallel": "mlsys_engine.strategies.data_parallel:DataParallel",
    "hybrid_parallel": "mlsys_engine.strategies.hybrid_parallel:HybridParallel",
    "model_parallel": "mlsys_engine.strategies.model_parallel:ModelParallel",
    "pipeline_parallel": "mlsys_engine.strategies.pipeline_parallel:PipelineParallel",
}
# Names that the design has and this version does not build: refused as such, not as spelling mistakes.
_LATER = ("auto",)


def strategy_type(name: str) -> type[Any]:
    """The class of a strategy by its name in the table; raises ConfigError for a name that is not there."""
    if name in _LATER:
        raise ConfigError(
            f"Strategy {name!r}.", f"This version builds {', '.join(STRATEGIES)}.", 'Use "data_parallel".'
        )
    if name not in STRATEGIES:
        raise ConfigError(
            f"Strategy {name!r}.",
            f"A strategy is a value such as mls.DataParallel(), or one of {', '.join(STRATEGIES)}.",
            did_you_mean(name, (*STRATEGIES, *_LATER)),
        )
    module, _, attribute = STRATEGIES[name].partition(":")
    loaded: type[Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def from_name(name_or_value: Any) -> Strategy:
    """A strategy from its name ("data_parallel" or "DataParallel", with defaults), or the value itself."""
    if isinstance(name_or_value, str):
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name_or_value).lower().replace("-", "_")
        value: Strategy = strategy_type(name)()
        return value
    if isinstance(name_or_value, type) or not all(
        hasattr(name_or_value, part) for part in ("name", "plan", "build")
    ):
        shown = name_or_value.__name__ if isinstance(name_or_value, type) else repr(name_or_value)
        raise ConfigError(
            f"strategy={shown}.",
            f"A strategy is a value such as mls.DataParallel(), or one of {', '.join(STRATEGIES)}.",
            f"Write {shown}()." if isinstance(name_or_value, type) else "Pass mls.DataParallel().",
        )
    checked: Strategy = name_or_value
    return checked
