"""The stages of a pipeline that one rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from mlsys_engine.comm.mesh import Mesh, device_of
from mlsys_engine.data_parallel.accumulation import Accumulation
from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.errors import ConfigError, InternalError
from mlsys_engine.optim import LossScaler
from mlsys_engine.pipeline.partial import Cuts, StagePart, parameter_stages
from mlsys_engine.pipeline.runtime import (
    PipelineAccumulation,
    PlannedSchedule,
    broadcast,
    chosen,
    find_ties,
    stage_of,
)
from mlsys_engine.plan import Plan

MICROBATCHES = "microbatches"  # of Plan.algorithms


class StageShare:
    """A data_parallel.Share: made from the whole model, before it is divided."""

    def __init__(self, plan: Plan, model: nn.Module, mesh: Mesh) -> None:
        parts = mesh.group("pipeline", "model")
        pipeline = mesh.group("pipeline")
        if parts is None or pipeline is None or plan.schedule is None:
            raise InternalError("a share of stages without other ranks")
        self.parts, self.data, self._pipeline = parts, mesh.group("data"), pipeline
        self.data_rank, self.counts_loss, self.launches = mesh.coordinate("data"), True, True
        planned = dict(plan.stages)
        units = {name for name in planned if not any(name.startswith(f"{other}.") for other in planned)}
        self._stages = {name: stage for name, stage in planned.items() if name in units}
        self._escapes = tuple(name for name in planned if name not in units)
        self._check_units(model)
        self._algorithms = dict(plan.algorithms)
        self._schedule = PlannedSchedule(
            plan.schedule,
            stages=1 + max(self._stages.values()),
            ranks=plan.axis("pipeline"),
            pieces=int(self._algorithms[MICROBATCHES]),
            accumulate=plan.accumulate,
        )
        self._rank = mesh.coordinate("pipeline")
        self._own = {stage for stage, rank in enumerate(self._schedule.placement) if rank == self._rank}
        self._ties = find_ties(model, self._stages)
        self._homes = parameter_stages(model, self._stages)
        self._homes |= {tie.name: tie.stages for tie in self._ties}
        self._names = list(model.state_dict())  # as one process has them
        self._owners = self._find_owners(model)
        self.elsewhere = frozenset(name for name, ranks in self._owners.items() if self._rank not in ranks)
        self.plan = self._local_plan(plan)
        self._stage_of_bucket = tuple(
            stages[0] if len(stages) == 1 else None
            for bucket in self.plan.buckets
            for stages in (self._homes[bucket.slots[0].name],)
        )
        self.counted = tuple(
            self._homes[bucket.slots[0].name][0] in self._own for bucket in self.plan.buckets
        )

    holds_parts = False

    def joined(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """No parameter is divided."""
        return part

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Any rule can: no parameter is divided."""

    def take(self, model: nn.Module) -> None:
        """Parameters of other ranks stay the objects that they are, on the meta device."""
        for name, parameter in model.named_parameters():
            if name in self.elsewhere:
                absent = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
                torch.utils.swap_tensors(parameter, absent)

    def accumulation(
        self,
        model: nn.Module,
        reducer: Reducer,
        device: torch.device,
        scaler: LossScaler | None,
        *,
        shapes: Mapping[str, Sequence[int]] | None = None,
        cuts: Cuts | None = None,
    ) -> Accumulation:
        """`shapes` are the whole's of parameters that are held in part, and `cuts` what they run under."""
        num_stages = len(self._schedule.placement)
        return PipelineAccumulation(
            schedule=self._schedule,
            model=model,
            parts={
                stage: StagePart(
                    model, stage, self._stages, num_stages, self._escapes, shapes=shapes, cuts=cuts
                )
                for stage in sorted(self._own)
            },
            group=self._pipeline,
            device=device,
            gradients=reducer,
            stage_of_bucket=self._stage_of_bucket,
            ties=self._ties,
            tied_choices={tie.name: chosen(self._algorithms, tie) for tie in self._ties},
            scaler=scaler,
        )

    def local(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a state of the whole model what is here; groups name all parameters everywhere."""
        model = {name: value for name, value in state["model"].items() if name not in self.elsewhere}
        own = {**state, "model": model}
        if "optimizer" in state:
            moments = {
                name: value
                for name, value in state["optimizer"]["state"].items()
                if name not in self.elsewhere
            }
            own["optimizer"] = {**state["optimizer"], "state": moments}
        return own

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The states of all stages as one, in one process' order."""
        model, moments = dict(state["model"]), dict(state["optimizer"]["state"])
        device = device_of(self._pipeline)
        for source in range(dist.get_world_size(self._pipeline)):
            own = (state["model"], state["optimizer"]["state"]) if source == self._rank else None
            own = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, own)
            arrived = broadcast(own, source, self._pipeline, device)
            if source != self._rank:
                there = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, arrived)
                model = {**there[0], **model}
                moments = {**there[1], **moments}
        ordered = {name: model[name] for name in self._names if name in model}
        by_order = sorted(moments, key={name: place for place, name in enumerate(self._homes)}.__getitem__)
        optimizer = {**state["optimizer"], "state": {name: moments[name] for name in by_order}}
        return {**state, "model": ordered | model, "optimizer": optimizer}

    @torch.no_grad()
    def give_back(self, model: nn.Module) -> None:
        """Every stage sends its weights and buffers to all ranks."""
        device = next(p.device for p in model.parameters() if not p.is_meta)
        tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        for name, tensor in tensors.items():
            ranks = self._owners.get(name, ())
            if len(ranks) == dist.get_world_size(self._pipeline) or not ranks:
                continue
            if tensor.is_meta:
                here = nn.Parameter(torch.empty_like(tensor, device=device), tensor.requires_grad)
                torch.utils.swap_tensors(tensor, here)
            arrived = broadcast(
                tensor.detach() if self._rank == ranks[0] else None, ranks[0], self._pipeline, device
            )
            tensor.copy_(arrived)

    def _find_owners(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The pipeline ranks that hold each parameter and buffer, by every name that it has."""
        placement = self._schedule.placement
        first = {id(parameter): name for name, parameter in model.named_parameters()}
        owners = {
            name: tuple(dict.fromkeys(placement[stage] for stage in self._homes[first[id(parameter)]]))
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        everywhere = tuple(range(dist.get_world_size(self._pipeline)))
        for name, _ in model.named_buffers(remove_duplicate=False):
            in_unit = any(name.startswith(f"{unit}.") for unit in self._stages)
            owners[name] = (placement[stage_of(name, self._stages)],) if in_unit else everywhere
        return owners

    def _local_plan(self, plan: Plan) -> Plan:
        kept = [
            index
            for index, bucket in enumerate(plan.buckets)
            if self._own & set(self._homes[bucket.slots[0].name])
        ]
        if not kept:
            raise ConfigError(
                f"Rank {self._rank} of the pipeline has no trainable parameter.",
                "Every rank of a pipeline trains some of the model; its stages are "
                f"{', '.join(map(str, sorted(self._own)))}.",
                "Choose split= so that every stage has one, or use fewer stages.",
            )
        return replace(
            plan,
            buckets=tuple(plan.buckets[index] for index in kept),
            partition=tuple(plan.partition[index] for index in kept) if plan.partition else (),
        )

    def _check_units(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for name in (*self._stages, *self._escapes):
            if name not in modules:
                raise ConfigError(
                    f"The plan has a stage for {name}, and the model has no such module.",
                    "A plan is for the modules of one model, by name.",
                    "Make the plan from this model with mls.plan.",
                )
