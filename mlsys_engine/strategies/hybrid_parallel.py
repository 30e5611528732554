"""Several kinds of parallelism at once, each on its axis of the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlsys_engine.errors import ConfigError
from mlsys_engine.plan import Plan
from mlsys_engine.strategies.base import PlanOptions, Subject
from mlsys_engine.strategies.data_parallel import DataParallel
from mlsys_engine.strategies.mesh import build_mesh, plan_mesh
from mlsys_engine.strategies.model_parallel import ModelParallel
from mlsys_engine.strategies.pipeline_parallel import PipelineParallel


@dataclass(frozen=True, kw_only=True)
class HybridParallel:
    """Data times pipeline times model parallelism: the product of the axes is the world.

    Each axis is a number of ranks, or its strategy value where it has settings. Ranks that differ along the
    data axis alone hold the same part of the model and feed different data; ranks of one pipeline, and
    those that share weights, feed the same. Ranks of the model axis are neighbours, then those of the data
    axis.
    """

    name: ClassVar[str] = "hybrid_parallel"

    data: int | DataParallel | None = None
    """Ranks that feed different data, or a DataParallel on as many as the others leave; None: as many."""
    pipeline: int | PipelineParallel = 1
    """Ranks that the model's blocks are divided over; a PipelineParallel names its stages."""
    model: int | ModelParallel = 1
    """Ranks that the weights of each block are cut over; a ModelParallel names its size."""

    def __post_init__(self) -> None:
        for field, kind in (
            ("data", DataParallel),
            ("pipeline", PipelineParallel),
            ("model", ModelParallel),
        ):
            value = getattr(self, field)
            size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not (size or isinstance(value, kind) or (field == "data" and value is None)):
                raise ConfigError(
                    f"HybridParallel({field}={value!r}).",
                    f"An axis is a number of ranks of at least 1, or a mls.{kind.__name__}.",
                    f"Leave {field} out, or give {field}=2.",
                )
        if isinstance(self.pipeline, PipelineParallel) and self.pipeline.stages is None:
            raise _untold("PipelineParallel", "stages")
        if isinstance(self.model, ModelParallel) and self.model.size is None:
            raise _untold("ModelParallel", "size")

    def plan(self, subject: Subject, world_size: int, options: PlanOptions) -> Plan:
        """The layout on a world that is the product of the axes; raises ConfigError for what cannot be."""
        pipeline = (
            self.pipeline if isinstance(self.pipeline, PipelineParallel) else PipelineParallel(self.pipeline)
        )
        model = self.model if isinstance(self.model, ModelParallel) else ModelParallel(self.model)
        stages, cuts = pipeline.stages or 1, model.size or 1
        data_size = self.data if isinstance(self.data, int) else world_size // (stages * cuts)
        product = data_size * stages * cuts
        if product != world_size:
            axes = ", ".join(
                f"{axis}={size}"
                for axis, size in (("data", data_size), ("pipeline", stages), ("model", cuts))
                if size > 1 or axis == "data"
            )
            raise ConfigError(
                f"HybridParallel({axes}), {product} ranks, on {world_size} ranks.",
                "The product of the axes is the number of ranks.",
                f"Launch {product} ranks, or leave data out and choose other axes whose product divides "
                f"{world_size}.",
            )
        return plan_mesh(
            self.name,
            subject,
            options,
            data=self.data if isinstance(self.data, DataParallel) else DataParallel(),
            data_size=data_size,
            pipeline=pipeline,
            pipeline_size=stages,
            model=model,
            model_size=cuts,
        )

    build = staticmethod(build_mesh)
    """Converts the model in place."""


def _untold(kind: str, field: str) -> ConfigError:
    return ConfigError(
        f"HybridParallel with a {kind} of no {field}.",
        "Beside other axes its part of the world has to be told.",
        f"Write {kind}({field}=2, ...), for example.",
    )
