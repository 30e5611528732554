"""A step, an evaluation and a prediction through a pipeline: what a data-parallel runner plugs in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from mlsys_engine.errors import ConfigError, DataError
from mlsys_engine.optim import LossScaler
from mlsys_engine.pipeline.actions import (
    FORWARD,
    RECEIVE_FORWARD,
    SEND_FORWARD,
    flat,
)
from mlsys_engine.pipeline.runtime import outputs
from mlsys_engine.pipeline.runtime.cut import cut, signature
from mlsys_engine.pipeline.runtime.executor import Executor, Job
from mlsys_engine.pipeline.runtime.links import Links
from mlsys_engine.pipeline.runtime.planned import PlannedSchedule
from mlsys_engine.pipeline.runtime.random_state import restored, seed_microbatch
from mlsys_engine.pipeline.runtime.stage import Part, Stage
from mlsys_engine.pipeline.runtime.tied_sums import TiedSums
from mlsys_engine.pipeline.runtime.ties import IN_ORDER, Tie

Forward = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]  # microbatch -> (loss sum, count)
Lap = Callable[[str], None]
OnPart = Callable[[torch.Tensor], None]


class Gradients(Protocol):
    """The reducer of a rank's gradients (data_parallel.Reducer with automatic=False)."""

    @property
    def num_buckets(self) -> int: ...

    def start(self, num_backwards: int) -> None: ...

    def ready(self, parameter: nn.Parameter) -> None: ...

    def launch(self, bucket: int) -> None: ...

    def end_backward(self) -> None: ...


class PipelineAccumulation:
    """Runs the microbatches of a step through the stages of `group`, on each of its ranks.

    When a stage's gradients are complete, `gradients` is told to launch its buckets, while other stages are
    still running; buckets of tied parameters (`stage_of_bucket` None) wait for the end of the step. Each
    stage adds its gradients in the order of the microbatches, as one process does.
    """

    def __init__(
        self,
        *,
        schedule: PlannedSchedule,
        model: nn.Module,
        parts: Mapping[int, Part],
        group: dist.ProcessGroup,
        device: torch.device,
        gradients: Gradients,
        stage_of_bucket: Sequence[int | None],
        ties: Sequence[Tie] = (),
        tied_choices: Mapping[str, str] | None = None,
        scaler: LossScaler | None = None,
    ) -> None:
        self._schedule, self._model, self._group, self._device = schedule, model, group, device
        self._rank = dist.get_rank(group)
        self._gradients, self._stage_of_bucket = gradients, tuple(stage_of_bucket)
        placement = schedule.placement
        choices = {tie.name: (tied_choices or {}).get(tie.name, IN_ORDER) for tie in ties}
        links = Links(group, device)
        in_order = [tie for tie in ties if choices[tie.name] == IN_ORDER]
        stages = {
            stage: Stage(
                part,
                model,
                stage=stage,
                num_stages=len(placement),
                device=device,
                ties=in_order,
                scaler=scaler,
            )
            for stage, part in parts.items()
        }
        self._executor = Executor(stages, placement, links)
        self._tied = TiedSums(
            model,
            ties,
            choices,
            placement=placement,
            rank=self._rank,
            links=links,
            ready=gradients.ready,
        )
        self._last_rank = placement[-1]

    def run(
        self, batches: Sequence[Any], forward: Forward, lap: Lap, on_part: OnPart | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss sum and the count of all microbatches on the rank of the last stage, zeros elsewhere."""
        if on_part is not None:
            raise ConfigError(
                "The noise scale is to be measured in a pipeline.",
                "It is measured on the gradient of each microbatch, and here several are in flight.",
                "Leave noise_scale out, or measure it with data parallelism.",
            )
        microbatches = self._microbatches(batches)
        base = self._agree(len(microbatches))
        results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._gradients.start(1)  # all backwards of the step are one: nothing is launched by hooks
        launched = _Launched(self._gradients, self._stage_of_bucket)

        def keep(microbatch: int, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            results[microbatch] = output[0].detach(), output[1]  # and not the graph of the loss

        def call(microbatch: int) -> Any:
            seed_microbatch(base, microbatch)
            return forward(microbatches[microbatch])

        if microbatches:
            row, split = self._schedule.row(self._rank, len(microbatches))
            job = Job(
                call=call,
                signatures=[self._signature(microbatch) for microbatch in microbatches],
                on_output=keep,
                loss_of=lambda output: output[0] if _counts(output[1]) else None,
                on_reduce=launched.complete,
                lap=lap,
                split=split,
            )
            with restored(self._device):
                self._executor.run(row, job)
            with torch._C.DisableTorchFunction():  # sums of what is held, also where that is a part
                self._tied.finish()
        self._gradients.end_backward()
        return self._totals(results)

    def evaluate(self, batch: Any, forward: Forward) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss sum and the count of a batch on the rank of the last stage, zeros elsewhere.

        Without gradients, whatever the mode of the modules; every rank of the group calls it.
        """
        microbatches = cut(batch, self._schedule.pieces)
        results: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._run_forward(microbatches, forward, results.__setitem__)
        return self._totals(results)

    def predict(self, batch: Any, call: Callable[[Any], Any]) -> Any:
        """The model's output for a batch, on every rank of the group; it is not cut."""
        found: list[Any] = []
        self._run_forward([batch], call, lambda microbatch, output: found.append(output))
        return outputs.broadcast(found[0] if found else None, self._last_rank, self._group, self._device)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _run_forward(
        self, microbatches: Sequence[Any], call: Callable[[Any], Any], on_output: Callable[[int, Any], None]
    ) -> None:
        row, _ = self._schedule.row(self._rank, len(microbatches))
        with torch.no_grad():
            job = Job(
                call=lambda microbatch: call(microbatches[microbatch]),
                signatures=[self._signature(microbatch) for microbatch in microbatches],
                on_output=on_output,
            )
            kinds = (FORWARD, SEND_FORWARD, RECEIVE_FORWARD)
            self._executor.run([action for action in flat(row) if action.kind in kinds], job)

    def _microbatches(self, batches: Sequence[Any]) -> list[Any]:
        if len(batches) > self._schedule.accumulate:
            return list(batches)
        return [piece for batch in batches for piece in cut(batch, self._schedule.pieces)]

    def _signature(self, microbatch: Any) -> Any:
        return signature(microbatch), self._model.training, torch.is_grad_enabled()

    def _agree(self, num_microbatches: int) -> int:
        """One seed for the step on all ranks of the pipeline, which have to have as many microbatches."""
        own = torch.tensor([num_microbatches, int(torch.randint(2**62, ()))], device=self._device)
        first = own.clone()
        dist.broadcast(first, group=self._group, group_src=0)
        numbers = first.tolist()
        if numbers[0] != num_microbatches:
            raise DataError(
                f"Rank {self._rank} of the pipeline was given {num_microbatches} microbatches.",
                f"Its rank 0 has {numbers[0]}, and every rank of a pipeline is given the same batches.",
                "Feed each rank the share data_rank of num_data_shards.",
            )
        return int(numbers[1])

    def _totals(
        self, results: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        count = torch.zeros((), dtype=torch.float64, device=self._device)
        for microbatch in sorted(results):
            part, part_count = results[microbatch]
            loss_sum += part.detach()
            count += part_count
        return loss_sum, count


class _Launched:
    """Launches buckets in their order, each when the stage that it belongs to is complete."""

    def __init__(self, gradients: Gradients, stage_of_bucket: Sequence[int | None]) -> None:
        self._gradients, self._stage_of_bucket = gradients, stage_of_bucket
        self._complete: set[int] = set()
        self._next = 0

    def complete(self, stage: int) -> None:
        self._complete.add(stage)
        while self._next < len(self._stage_of_bucket):
            if self._stage_of_bucket[self._next] not in self._complete:
                return
            self._gradients.launch(self._next)
            self._next += 1


def _counts(count: torch.Tensor) -> bool:
    return count.device.type != "cpu" or count.item() > 0
