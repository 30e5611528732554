"""Plans and runners over several axes of ranks: what the strategies that divide a model have in common.

The mesh has the axes pipeline, data and model, in this order; ranks of the last are neighbours. Buckets
never mix stages, nor what is cut with what is whole. A parameter that several stages use has a bucket of
its own, behind all others: its gradient is complete when the step's last backward is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from mlsys_engine.comm.launch import World
from mlsys_engine.comm.mesh import Mesh
from mlsys_engine.data_parallel.buckets import layout_buckets
from mlsys_engine.data_parallel.build import build_runner
from mlsys_engine.data_parallel.share import Share
from mlsys_engine.errors import ConfigError
from mlsys_engine.numerics import PRECISION_RULES, Loss
from mlsys_engine.optim import GradientNoiseScale, LossScaler
from mlsys_engine.pipeline.partial import parameter_stages
from mlsys_engine.pipeline.runtime import find_ties, tied_choices
from mlsys_engine.plan import Bucket, MeshAxis, Plan, Runner
from mlsys_engine.strategies.base import OptimizerFactory, PlanOptions, Subject
from mlsys_engine.strategies.cut_share import CutShare
from mlsys_engine.strategies.data_parallel import DataParallel
from mlsys_engine.strategies.stage_share import MICROBATCHES, StageShare
from mlsys_engine.tensor_parallel import shardings

PIPELINE, DATA, MODEL = "pipeline", "data", "model"


class Staging(Protocol):
    """The value of the pipeline axis (strategies.PipelineParallel)."""

    def resolve(
        self, subject: Subject, ranks: int, options: PlanOptions
    ) -> tuple[dict[str, int], tuple[str, ...], str, int]:
        """The stage of each unit, the modules that others read into, the schedule and the microbatches."""


class Cutting(Protocol):
    """The value of the model axis (strategies.ModelParallel)."""

    def resolve(self, subject: Subject, size: int) -> tuple[tuple[str, str], ...]:
        """The styles of modules and parameters."""

    def choices(self) -> tuple[tuple[str, str], ...]:
        """For Plan.algorithms."""


def plan_mesh(
    name: str,
    subject: Subject,
    options: PlanOptions,
    *,
    data: DataParallel,
    data_size: int,
    pipeline: Staging | None = None,
    pipeline_size: int = 1,
    model: Cutting | None = None,
    model_size: int = 1,
) -> Plan:
    """The plan of the strategy `name`; raises ConfigError for what cannot be."""
    whole = data.plan(subject, data_size, options)
    pipeline, model = (pipeline if pipeline_size > 1 else None), (model if model_size > 1 else None)
    if pipeline is None and model is None:
        return replace(whole, strategy=name)
    _check_options(options, is_cut=model is not None)
    styles = () if model is None else model.resolve(subject, model_size)
    axes = ((PIPELINE, pipeline_size), (DATA, data_size), (MODEL, model_size))
    plan = replace(
        whole,
        strategy=name,
        mesh=tuple(MeshAxis(name=axis, size=size) for axis, size in axes if size > 1),
        tensor_parallel=styles,
        algorithms=(*whole.algorithms, *(() if model is None else model.choices())),
    )
    stages: dict[str, int] = {}
    tied: set[str] = set()
    if pipeline is not None:
        stages, escapes, schedule, microbatches = pipeline.resolve(subject, pipeline_size, options)
        ties = find_ties(subject.model, stages)
        tied = {tie.name for tie in ties}
        plan = replace(
            plan,
            stages=(*stages.items(), *((escape, _stage_within(escape, stages)) for escape in escapes)),
            schedule=schedule,
            algorithms=(
                *plan.algorithms,
                (MICROBATCHES, str(microbatches)),  # the pieces of each batch, added up in their order
                *tied_choices(subject.model, ties, options.numerics),
            ),
        )
    cut = shardings(subject.model, styles, model_size)
    buckets = _buckets(subject, options, bucket_mib=data.bucket_mib, stages=stages, tied=tied, cut=cut)
    return replace(plan, buckets=buckets, partition=data.partition(buckets, data_size))


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
    mesh = Mesh.build(axes, [(DATA,), (PIPELINE,), (MODEL,), (PIPELINE, MODEL)])
    stages = StageShare(plan, model, mesh) if mesh.size(PIPELINE) > 1 else None
    share: Share | None = CutShare(plan, model, mesh, stages) if mesh.size(MODEL) > 1 else stages
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


def _buckets(
    subject: Subject,
    options: PlanOptions,
    *,
    bucket_mib: float,
    stages: Mapping[str, int],
    tied: set[str],
    cut: Collection[str],
) -> tuple[Bucket, ...]:
    """Those of the last stage first, as their gradients are complete first; tied parameters behind all."""
    pure = PRECISION_RULES[options.precision].parameters is not None
    gradients = torch.float32 if pure else None
    trainable = [parameter.fqn for parameter in subject.trace.parameters_in_order()]
    groups: list[list[str]] = [[] for _ in range(1 + max(stages.values(), default=0))]
    homes = parameter_stages(subject.model, stages) if stages else dict.fromkeys(trainable, (0,))
    for name, (stage, *_) in homes.items():
        if name not in tied:
            groups[stage].append(name)
    complete = {name: place for place, name in enumerate(reversed(trainable))}
    buckets: list[Bucket] = []
    for group in (*reversed(groups), *([name] for name in homes if name in tied)):
        found = [
            bucket
            for names in ({*group} - {*cut}, {*group} & {*cut})
            for bucket in layout_buckets(subject.trace, bucket_mib, gradients=gradients, names=names)
        ]
        buckets += sorted(found, key=lambda bucket: max(complete[slot.name] for slot in bucket.slots))
    return tuple(buckets)


def _stage_within(name: str, stages: Mapping[str, int]) -> int:
    return next(stage for unit, stage in stages.items() if name.startswith(f"{unit}."))


def _check_options(options: PlanOptions, *, is_cut: bool) -> None:
    if options.numerics == "world_invariant":
        raise ConfigError(
            'numerics="world_invariant" for a model that is divided over ranks.',
            "Its canonical tree is over the gradients of whole microbatches, one after the other on a rank.",
            'Use numerics="reproducible", or DataParallel().',
        )
    if options.compile:
        raise ConfigError(
            "compile=True for a model that is divided over ranks.",
            "What a rank runs of a forward is decided as it runs, which a compiled one does not show.",
            "Leave compile out."
            if is_cut
            else "Compile the blocks themselves, block.compile(), before mls.plan; or leave compile out.",
        )
