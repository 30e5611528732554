"""The strategies, and plan, apply and wrap, which turn them into runners."""

from mlsys_engine.strategies.activations import check_activation
from mlsys_engine.strategies.api import apply, check_loss, plan, wrap
from mlsys_engine.strategies.base import PlanOptions, Strategy
from mlsys_engine.strategies.data_parallel import DataParallel
from mlsys_engine.strategies.hybrid_parallel import HybridParallel
from mlsys_engine.strategies.model_parallel import ModelParallel
from mlsys_engine.strategies.pipeline_parallel import PipelineParallel
from mlsys_engine.strategies.registry import STRATEGIES, from_name, strategy_type

__all__ = [
    "STRATEGIES",
    "DataParallel",
    "HybridParallel",
    "ModelParallel",
    "PipelineParallel",
    "PlanOptions",
    "Strategy",
    "apply",
    "check_activation",
    "check_loss",
    "from_name",
    "plan",
    "strategy_type",
    "wrap",
]
