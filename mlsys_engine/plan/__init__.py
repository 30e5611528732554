"""The resolved layout of a model on a world, as a value, and the interface of what is built from it."""

from mlsys_engine.plan.plan import NUMERICS_MODES, PRECISIONS, SCHEMA_VERSION, SHARD_LEVELS, SYNC_MODES, Plan
from mlsys_engine.plan.runner import EvalResult, Runner, StepResult
from mlsys_engine.plan.values import DTYPES, Bucket, BucketSlot, MeshAxis

__all__ = [
    "DTYPES",
    "NUMERICS_MODES",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "SHARD_LEVELS",
    "SYNC_MODES",
    "Bucket",
    "BucketSlot",
    "EvalResult",
    "MeshAxis",
    "Plan",
    "Runner",
    "StepResult",
]
