"""The native optimizers by name: a new one is a file and a line here, and the contract tests find it."""

from __future__ import annotations

import importlib

from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.optim.base import NativeOptimizer

OPTIMIZERS = {
    "adafactor": "mlsys_engine.optim.rules.adafactor:Adafactor",
    "adagrad": "mlsys_engine.optim.rules.adagrad:Adagrad",
    "adam": "mlsys_engine.optim.rules.adam:Adam",
    "adamw": "mlsys_engine.optim.rules.adamw:AdamW",
    "lamb": "mlsys_engine.optim.rules.lamb:LAMB",
    "lars": "mlsys_engine.optim.rules.lars:LARS",
    "lion": "mlsys_engine.optim.rules.lion:Lion",
    "muon": "mlsys_engine.optim.rules.muon:Muon",
    "schedule_free_adamw": "mlsys_engine.optim.rules.schedule_free_adamw:ScheduleFreeAdamW",
    "sgd": "mlsys_engine.optim.rules.sgd:SGD",
}


def optimizer_class(name: str) -> type[NativeOptimizer]:
    """The class of a registered optimizer."""
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"The optimizer {name!r} was asked for.",
            f"One of {', '.join(OPTIMIZERS)} is expected.",
            did_you_mean(name, OPTIMIZERS),
        )
    module, _, attribute = OPTIMIZERS[name].partition(":")
    found: type[NativeOptimizer] = getattr(importlib.import_module(module), attribute)
    return found
