"""What keeps values cut: functions by name, each with a rule.

A rule is called with (context, func, args, kwargs), where the cut arguments are CutTensors, and returns the
function's result, or NotImplemented where it has to see them whole.
"""

from mlsys_engine.tensor_parallel.runtime.rules import (
    elementwise,
    experts,
    indexing,
    lookups,
    normalization,
    products,
    shapes,
)

RULES = {
    **elementwise.RULES,
    **shapes.RULES,
    **indexing.RULES,
    **products.RULES,
    **normalization.RULES,
    **lookups.RULES,
    **experts.RULES,
}

__all__ = ["RULES"]
