"""The loss contract, clipping, precision, seeds and the promises about bits."""

from mlsys_engine.numerics.call import call_model, num_samples, to_device
from mlsys_engine.numerics.clip import GradientScale, gradient_scale
from mlsys_engine.numerics.loss import Loss, loss_sum_and_count, shifts_labels
from mlsys_engine.numerics.modes import numerics_mode
from mlsys_engine.numerics.precision import PRECISION_RULES, PrecisionRule, autocast
from mlsys_engine.numerics.rng import derived_seed, seed_data_rank, seed_generators, seed_leaf
from mlsys_engine.numerics.tree_sum import TreeSum

__all__ = [
    "PRECISION_RULES",
    "GradientScale",
    "Loss",
    "PrecisionRule",
    "TreeSum",
    "autocast",
    "call_model",
    "derived_seed",
    "gradient_scale",
    "loss_sum_and_count",
    "num_samples",
    "numerics_mode",
    "seed_data_rank",
    "seed_generators",
    "seed_leaf",
    "shifts_labels",
    "to_device",
]
