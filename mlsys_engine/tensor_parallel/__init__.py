"""Plans for tensor parallelism of ordinary models: how parameters are cut over the ranks of a model axis."""

from mlsys_engine.tensor_parallel.given import plan_of_model, styles_of_plan
from mlsys_engine.tensor_parallel.infer import Inferred, check_heads, infer
from mlsys_engine.tensor_parallel.report import Report, Row, report
from mlsys_engine.tensor_parallel.sharding import Sharding
from mlsys_engine.tensor_parallel.styles import shardings, style_texts

__all__ = [
    "Inferred",
    "Report",
    "Row",
    "Sharding",
    "check_heads",
    "infer",
    "plan_of_model",
    "report",
    "shardings",
    "style_texts",
    "styles_of_plan",
]
