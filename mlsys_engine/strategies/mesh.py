"""Plans and runners over several axes of ranks: what the strategies that divide a model have in common.

The mesh has the axes pipeline, data and model, in this order; ranks of the last are neighbours. Buckets never
mix stages. A parameter that several stages use has a bucket of its own, behind all others: its gradient is
complete when the step's last backward is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from mlsys_engine.comm.launch import World
from mlsys_engine.comm.mesh import Mesh
from mlsys_engine.data_parallel.buckets import layout_buckets
from mlsys_engine.data_parallel.build import build_runner
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import PRECISION_RULES, Loss
from mlsys_engine.optim import GradientNoiseScale, LossScaler
from mlsys_engine.pipeline.partial import parameter_stages
from mlsys_engine.pipeline.runtime import find_ties, tied_choices
from mlsys_engine.plan import Bucket, MeshAxis, Plan, Runner
from mlsys_engine.strategies.base import OptimizerFactory, PlanOptions, Subject
from mlsys_engine.strategies.data_parallel import DataParallel
from mlsys_engine.strategies.stage_share import MICROBATCHES, StageShare

PIPELINE, DATA, MODEL = "pipeline", "data", "model"


class Staging(Protocol):
    """The value of the pipeline axis (strategies.PipelineParallel)."""

    def resolve(
        self, subject: Subject, ranks: int, options: PlanOptions
    ) -> tuple[dict[str, int], tuple[str, ...], str, int]:
        """The stage of each unit, the modules that others read into, the schedule and the microbatches."""


def plan_mesh(
    name: str,
    subject: Subject,
    options: PlanOptions,
    *,
    data: DataParallel,
    data_size: int,
    pipeline: Staging | None,
    pipeline_size: int,
) -> Plan:
    """The plan of the strategy `name`; raises ConfigError for what cannot be."""
    whole = data.plan(subject, data_size, options)
    if pipeline is None or pipeline_size == 1:
        return replace(whole, strategy=name)
    _check_options(options)
    stages, escapes, schedule, microbatches = pipeline.resolve(subject, pipeline_size, options)
    ties = find_ties(subject.model, stages)
    buckets = _stage_buckets(subject, options, data.bucket_mib, stages, {tie.name for tie in ties})
    axes = ((PIPELINE, pipeline_size), (DATA, data_size))
    algorithms = (
        *whole.algorithms,
        (MICROBATCHES, str(microbatches)),  # the pieces of each batch, added up in their order
        *tied_choices(subject.model, ties, options.numerics),
    )
    return replace(
        whole,
        strategy=name,
        mesh=tuple(MeshAxis(name=axis, size=size) for axis, size in axes if size > 1),
        buckets=buckets,
        partition=data.partition(buckets, data_size),
        stages=(*stages.items(), *((escape, _stage_within(escape, stages)) for escape in escapes)),
        schedule=schedule,
        algorithms=algorithms,
    )


def build_mesh(
    plan: Plan,
    model: nn.Module,
    *,
    optimizer: OptimizerFactory,
    loss: Loss | None,
    max_grad_norm: float | None,
    world: World,
    loss_scaler: LossScaler | None,
    noise_scale: GradientNoiseScale | None,
) -> Runner:
    """Builds what `plan_mesh` has made, converting the model in place."""
    axes = [(axis.name, axis.size) for axis in plan.mesh]
    mesh = Mesh.build(axes, [(DATA,), (PIPELINE,), (PIPELINE, MODEL)])
    share = StageShare(plan, model, mesh) if mesh.size(PIPELINE) > 1 else None
    return build_runner(
        plan,
        model,
        optimizer=optimizer,
        loss=loss,
        max_grad_norm=max_grad_norm,
        device=world.device,
        group=mesh.group(DATA),
        loss_scaler=loss_scaler,
        noise_scale=noise_scale,
        share=share,
    )


def _stage_buckets(
    subject: Subject, options: PlanOptions, bucket_mib: float, stages: Mapping[str, int], tied: set[str]
) -> tuple[Bucket, ...]:
    """Those of the last stage first, as their gradients are complete first; tied parameters behind all."""
    pure = PRECISION_RULES[options.precision].parameters is not None
    gradients = torch.float32 if pure else None
    homes = parameter_stages(subject.model, stages)
    groups: list[list[str]] = [[] for _ in range(max(stages.values()) + 1)]
    for name, (stage, *_) in homes.items():
        if name not in tied:
            groups[stage].append(name)
    names: Sequence[list[str]] = [*reversed(groups), *([name] for name in homes if name in tied)]
    return tuple(
        bucket
        for each in names
        for bucket in layout_buckets(subject.trace, bucket_mib, gradients=gradients, names=set(each))
    )


def _stage_within(name: str, stages: Mapping[str, int]) -> int:
    return next(stage for unit, stage in stages.items() if name.startswith(f"{unit}."))


def _check_options(options: PlanOptions) -> None:
    if options.numerics == "world_invariant":
        raise ConfigError(
            'numerics="world_invariant" for a model that is divided into stages.',
            "Its canonical tree is over the gradients of whole microbatches, one after the other on a rank.",
            'Use numerics="reproducible", or DataParallel().',
        )
    if options.compile:
        raise ConfigError(
            "compile=True for a model that is divided into stages.",
            "The part of a forward that a stage runs is chosen as it runs, which a compiled one is not.",
            "Compile the blocks themselves, block.compile(), before mls.plan; or leave compile out.",
        )
