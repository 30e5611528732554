"""Tensor parallelism of ordinary models: how parameters are cut over the ranks of the model axis."""

from mlsys_engine.tensor_parallel.given import plan_of_model, styles_of_plan
from mlsys_engine.tensor_parallel.sharding import Sharding
from mlsys_engine.tensor_parallel.styles import shardings, style_texts

__all__ = ["Sharding", "plan_of_model", "shardings", "style_texts", "styles_of_plan"]
