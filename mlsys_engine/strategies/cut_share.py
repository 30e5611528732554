"""The parts of parameters that one rank of a model axis holds, by themselves or of the stages it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.comm.mesh import Mesh, device_of
from mlsys_engine.data_parallel.accumulation import Accumulation, Call, Forward, InOrder, Lap, OnPart
from mlsys_engine.data_parallel.partition import partition_bucket
from mlsys_engine.data_parallel.reducer import Reducer
from mlsys_engine.errors import ConfigError, InternalError
from mlsys_engine.optim import LossScaler
from mlsys_engine.optim.base import NativeOptimizer
from mlsys_engine.plan import Bucket, Plan
from mlsys_engine.strategies.stage_share import StageShare
from mlsys_engine.tensor_parallel import Sharding, shardings
from mlsys_engine.tensor_parallel.runtime import TensorParallel
from mlsys_engine.tensor_parallel.runtime.collectives import all_parts
from mlsys_engine.trace import inventory

SEQUENCE_PARALLEL = "sequence_parallel"  # of Plan.algorithms
# Of torch.optim, those whose rule is the same function of each element.
_ELEMENTWISE = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
)


class CutShare:
    """A data_parallel.Share: made from the whole model, around the share of stages where there are any."""

    def __init__(self, plan: Plan, model: nn.Module, mesh: Mesh, stages: StageShare | None) -> None:
        group, parts = mesh.group("model"), mesh.group("pipeline", "model")
        if group is None or parts is None:
            raise InternalError("a share of cut parameters without other ranks")
        self.parts, self.data, self._group = parts, mesh.group("data"), group
        self._stages, self._rank = stages, mesh.coordinate("model")
        self.data_rank = mesh.coordinate("data")
        self.counts_loss = self._rank == 0 and (stages is None or stages.counts_loss)
        self.launches = stages is not None and stages.launches
        self.elsewhere = frozenset() if stages is None else stages.elsewhere
        self._sequence_parallel = SEQUENCE_PARALLEL in dict(plan.algorithms)
        self._shardings = shardings(model, plan.tensor_parallel, mesh.size("model"))
        parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(parameters[name].shape) for name in self._shardings}
        self._aliases = inventory.ties(model)  # further names of tied parameters -> the first
        inner = plan if stages is None else stages.plan
        self.plan = self._local_plan(inner)
        before = (True,) * len(inner.buckets) if stages is None else stages.counted
        self.counted = tuple(
            counted and (self._rank == 0 or bucket.slots[0].name in self._shardings)
            for counted, bucket in zip(before, inner.buckets, strict=True)
        )

    holds_parts = True

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises ConfigError for a rule that looks at whole parameters."""
        kind = type(optimizer)
        if isinstance(optimizer, NativeOptimizer):
            steps_parts = optimizer.shardable
            packed = any(group.get("moments") == "int8" for group in optimizer.param_groups)
        else:
            steps_parts = kind.__module__.startswith("torch.optim") and kind.__name__ in _ELEMENTWISE
            packed = False
        if not steps_parts or packed:
            shown = f'{kind.__name__}(moments="int8")' if packed else kind.__name__
            raise ConfigError(
                f"{shown} with parameters that are cut over ranks.",
                "Its rule reads whole parameters, of which each rank has a part.",
                "Use a rule of single elements, such as mls.optim.AdamW or mls.optim.Lion.",
            )
        if self._stages is not None:
            self._stages.check_optimizer(optimizer)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Parameters stay the objects that they are, with this rank's part; random numbers are rank 0's."""
        if self._stages is not None:
            self._stages.take(model)
        parameters = dict(model.named_parameters())
        for name, sharding in self._shardings.items():
            parameter = parameters[name]
            part = sharding.take(parameter.detach(), self._rank).clone(memory_format=torch.contiguous_format)
            torch.utils.swap_tensors(parameter, nn.Parameter(part, parameter.requires_grad))
        device = next(parameter.device for parameter in parameters.values() if not parameter.is_meta)
        self._agree_on_random_numbers(device)

    def accumulation(
        self, model: nn.Module, reducer: Reducer, device: torch.device, scaler: LossScaler | None
    ) -> Accumulation:
        here = {name: cut for name, cut in self._shardings.items() if name not in self.elsewhere}
        context = TensorParallel(
            model, here, self._shapes, self._group, sequence_parallel=self._sequence_parallel
        )
        if self._stages is None:
            return CutAccumulation(InOrder(reducer, device, scaler), context)
        first, share = self._shapes, self._stages
        shapes = first | {alias: first[name] for alias, name in self._aliases.items() if name in first}
        return CutAccumulation(
            share.accumulation(model, reducer, device, scaler, shapes=shapes, cuts=context), context
        )

    def local(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Of a state of the whole model the parts that are here."""
        own = dict(state) if self._stages is None else self._stages.local(state)

        def part(name: str, value: Any) -> Any:
            first = self._first(name)
            if first not in self._shardings or not _has_shape(value, self._shapes[first]):
                return value
            return self._shardings[first].take(value, self._rank)

        own["model"] = {name: part(name, value) for name, value in own["model"].items()}
        if "optimizer" in own:
            moments = {
                name: {key: part(name, value) for key, value in values.items()}
                for name, values in own["optimizer"]["state"].items()
            }
            own["optimizer"] = {**own["optimizer"], "state": moments}
        return own

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of this rank's neighbours joined to its own, then the stages."""
        joined: dict[str, torch.Tensor] = {}  # tied names share theirs

        def join(name: str, key: str, value: Any) -> Any:
            first = self._first(name)
            if first not in self._shardings:
                return value
            sharding = self._shardings[first]
            if not _has_shape(value, sharding.local_shape(self._shapes[first], self._rank)):
                return value
            if f"{first}/{key}" not in joined:
                joined[f"{first}/{key}"] = self._joined(value, sharding)
            return joined[f"{first}/{key}"]

        optimizer = state["optimizer"]
        moments = {
            name: {key: join(name, key, value) for key, value in values.items()}
            for name, values in optimizer["state"].items()
        }
        whole = {
            **state,
            "model": {name: join(name, "", value) for name, value in state["model"].items()},
            "optimizer": {**optimizer, "state": moments},
        }
        return whole if self._stages is None else self._stages.whole(whole)

    def joined(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A tensor of a parameter's shape from the parts of all ranks of the model axis."""
        sharding = self._shardings.get(self._first(name))
        return part if sharding is None else self._joined(part, sharding)

    @torch.no_grad()
    def give_back(self, model: nn.Module) -> None:
        """Every rank gets all parts, then all stages."""
        for name, parameter in dict(model.named_parameters()).items():
            if name in self._shardings and name not in self.elsewhere:
                whole = self._joined(parameter.detach(), self._shardings[name])
                torch.utils.swap_tensors(parameter, nn.Parameter(whole, parameter.requires_grad))
            elif name in self._shardings:
                whole = torch.empty(self._shapes[name], dtype=parameter.dtype, device="meta")
                torch.utils.swap_tensors(parameter, nn.Parameter(whole, parameter.requires_grad))
        if self._stages is not None:
            self._stages.give_back(model)

    def _joined(self, part: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        device = device_of(self._group)
        return all_parts(part.to(device), sharding, self._group).to(part.device)

    def _first(self, name: str) -> str:
        return self._aliases.get(name, name)

    def _local_plan(self, plan: Plan) -> Plan:
        """The same buckets in the shapes that their parameters have here."""

        def local(bucket: Bucket) -> Bucket:
            slots = tuple(
                replace(slot, shape=self._shardings[slot.name].local_shape(slot.shape, self._rank))
                if slot.name in self._shardings
                else slot
                for slot in bucket.slots
            )
            return replace(bucket, slots=slots)

        buckets = tuple(map(local, plan.buckets))
        size = plan.axis("data")
        parts = tuple(partition_bucket(bucket, size) for bucket in buckets) if plan.partition else ()
        return replace(plan, buckets=buckets, partition=parts)

    def _agree_on_random_numbers(self, device: torch.device) -> None:
        """Whole values are computed on every rank, and dropped alike."""
        here = device_of(self._group)
        state = torch.get_rng_state().to(here)
        dist.broadcast(state, group_src=0, group=self._group)
        torch.set_rng_state(state.cpu())
        if device.type == "cuda":
            state = torch.cuda.get_rng_state(device).to(here)
            dist.broadcast(state, group_src=0, group=self._group)
            torch.cuda.set_rng_state(state.cpu(), device)


class CutAccumulation:
    """Runs another accumulation while the model's parameters are seen whole."""

    def __init__(self, inner: Accumulation, context: TensorParallel) -> None:
        self._inner, self._context = inner, context

    def run(
        self, batches: Sequence[Any], forward: Forward, lap: Lap, on_part: OnPart | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._context.active():
            return self._inner.run(batches, self._gathering(forward), lap, on_part)

    def evaluate(self, batch: Any, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        with self._context.active():
            return self._inner.evaluate(batch, self._gathering(forward))

    def predict(self, batch: Any, call: Call) -> Any:
        with self._context.active():
            return self._context.gathered(self._inner.predict(batch, call))

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)

    def _gathering(self, forward: Forward) -> Forward:
        def gathered(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            loss, count = forward(batch)
            return self._context.whole(loss), self._context.whole(count)

        return gathered


def _has_shape(value: Any, shape: Sequence[int]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(shape)
